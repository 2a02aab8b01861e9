"Pages of the site: formulas, links and cells as a reader without a network sees them."
import re

import nbformat
import pages
import pytest
import sync


def test_formulas_become_mathml():
    text = pages.with_mathml('A step of $\\sigma$, `$HOME` stays.\n\n$$\\frac{a}{b}$$\n\n```sh\necho $PATH $X\n```')
    assert text.count('<math') == 2 and 'display="block"' in text and '<mfrac>' in text
    assert '`$HOME`' in text and 'echo $PATH $X' in text


@pytest.mark.parametrize('link, there', [
    ('[a](../core/02_entropy.ipynb#The-entropy-of-a-step)', '[a](../core/02_entropy.md#the-entropy-of-a-step)'),
    ('[b](an_hour.ipynb)', '[b](an_hour.md)'),
    ('[c](../figures/egrpo)', '[c](../figures/egrpo/index.md)'),
    ('[d](../../PAPERS.md)', '[d](../papers.md)'),
    ('[e](https://example.org)', '[e](https://example.org)'),
    ('![f](start_here_files/a.png)', '![f](start_here_files/a.png)'),
    ('![g](../../figures/demo.png)', '![g](../records/demo.png)'),
])
def test_links_lead_to_pages(link, there, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, 'docs', tmp_path)
    assert pages.relinked(link, sync.root/'nbs/guides/start_here.ipynb', 'guides/start_here.md') == there


def test_every_formula_of_every_notebook_is_understood():
    for path in sync.notebooks():
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == 'markdown': pages.with_mathml(cell.source)


def test_set_up_is_left_out_and_outputs_stay():
    new = nbformat.v4
    picture = new.new_output('display_data', {'text/plain': 'shown'})
    cells = [new.new_code_cell('#| export\nimport os\nfrom math import pi'), new.new_code_cell('#| export\ndef f(): return 1'),
             new.new_code_cell('draw()', outputs=[picture], metadata={'jupyter': {'source_hidden': True}})]
    kept = pages.readable(new.new_notebook(cells=cells)).cells
    assert [c.source for c in kept] == ['def f(): return 1', ''] and kept[1].outputs == [picture]


def test_a_page_per_name():
    from egrpo.core.entropy import merge_lengths
    from egrpo.train.trainer import Trainer
    text = pages.described(merge_lengths)
    assert text.startswith('# merge_lengths\n') and 'tau' in text and not re.search(r'^(---|\[source\])', text, re.M)
    assert {'fit', 'step', 'save'} <= {method.__name__ for method in pages.own_methods(Trainer)}
    assert pages.notebook_of('core.entropy') == 'nbs/core/02_entropy.ipynb'
