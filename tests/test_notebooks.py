"Notebooks are the source: they are clean, exported, small, complete and free of what one machine alone knows."
import json
import re
import shutil

import pytest
import sync

pages = sync.notebooks()
ids = [p.relative_to(sync.root/'nbs').with_suffix('').as_posix() for p in pages]
every = pytest.mark.parametrize('nb', pages, ids=ids)


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])


def test_there_are_notebooks(): assert pages


def test_in_sync():
    say = sync.check()
    assert not say, '\n' + '\n'.join(say)


@pytest.fixture
def project(tmp_path):
    "A copy to spoil, as `sync` sees the repository."
    folder = sync.copy(tmp_path)
    sync.rewrite(folder)
    return folder


@pytest.mark.parametrize('spoil, says', [
    ('edit', 'egrpo/core/sigmas.py: not what its notebook says'),
    ('drop', 'egrpo/core/sigmas.py: not exported'),
    ('stray', 'egrpo/stray.py: no notebook writes it'),
    ('run', 'nbs/core/00_sigmas.ipynb: not clean'),
])
def test_check_notices(project, monkeypatch, spoil, says):
    monkeypatch.setattr(sync, 'root', project)
    monkeypatch.setattr(sync.notebooks, '__defaults__', (project/'nbs',))
    module, nb = project/'egrpo/core/sigmas.py', project/'nbs/core/00_sigmas.ipynb'
    if spoil == 'edit': module.write_text(module.read_text() + '\nanswer = 42\n')
    if spoil == 'drop': module.unlink()
    if spoil == 'stray': shutil.copy(module, project/'egrpo/stray.py')
    if spoil == 'run': nb.write_text(re.sub(r'"execution_count": null', '"execution_count": 7', nb.read_text(), count=1))
    say = sync.differences(sync.sources(project), sync.fresh())
    assert len(say) == 1 and say[0].startswith(says), say


@every
def test_title(nb):
    first = cells(nb)[0]
    assert first['cell_type'] == 'markdown', f'{nb.name} starts with code: its first cell is the title'
    assert re.match(r'# \S.*\n+> \S', source(first)), f'{nb.name}: the first cell is `# name` and a line `> what it is`'


@every
def test_fixed_cell_ids(nb):
    found = [c.get('id') for c in cells(nb)]
    assert all(found) and len(set(found)) == len(found), f'{nb.name}: each cell has an id of its own'


@every
def test_every_cell_runs(nb):
    "A cell that never runs is no evidence. What takes long is `#| slow`, and what must fail says so by `test_fail` or `pytest.raises`."
    skipped = [source(c) for c in cells(nb) if re.search(r'^#\|\s*(eval:\s*false|skip_exec)|skip_exec: true', source(c), re.M)]
    assert not skipped, f'{nb.name}: {skipped[0]}'


@every
def test_no_error_output(nb):
    "No cell was saved with a traceback."
    errors = [o['ename'] for c in cells(nb) for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert not errors, f'{nb.name}: {errors}'


@every
def test_size(nb):
    size = nb.stat().st_size
    assert size <= 600_000, f'{nb.name} has {size//1000} kB: fewer or smaller pictures (dpi 80)'


@every
def test_no_conflict_markers(nb):
    "No cell was merged by halves."
    found = [c['id'] for c in cells(nb) if re.search('^(<{7}|>{7}) ', source(c), re.M)]
    assert not found, f'{nb.name}: solve the conflict in {", ".join(found)}'


figures = pytest.mark.parametrize('nb', [p for p in pages if sync.root/'nbs/figures' in p.parents], ids=lambda p: p.stem)


@figures
def test_answer_first(nb):
    "Below the title, before any other heading, stands what we see; above it only cells of set-up, collapsed."
    headings = [source(c).split('\n')[0] for c in cells(nb)[1:] if c['cell_type'] == 'markdown' and source(c).startswith('#')]
    assert headings[0] == '## What we see', f'{nb.name} begins with {headings[0]}'
    for c in cells(nb):
        if source(c).startswith('## What we see'): break
        if c['cell_type'] == 'code': assert c['metadata'] == {'jupyter': {'source_hidden': True}}, f'{nb.name}: collapse {c["id"]}'


@figures
def test_parameters(nb):
    "One cell of parameters, below a heading of its own, says how long the notebook takes."
    places = [i for i, c in enumerate(cells(nb)) if source(c).startswith('## Parameters\n')]
    assert len(places) == 1, f'{nb.name}: {len(places)} headings `## Parameters`'
    cell = cells(nb)[places[0] + 1]
    assert cell['cell_type'] == 'code', f'{nb.name}: the cell of parameters comes right below its heading'
    shown = json.dumps([o.get('data', o).get('text/plain') for o in cell['outputs']])
    assert re.search(r'\b(seconds|minutes|hours)\b', shown), f'{nb.name}: its parameters do not say how long it takes: `durations`'


@figures
def test_leads_on(nb):
    "The last cell leads to the notebooks before and after."
    assert re.match(r'(previous|next): \[', source(cells(nb)[-1])), f'{nb.name}: its last cell names the previous or the next notebook'


private = re.compile(r'(?<![\w.:/])/(?:work|tmp|root|home|opt|Users|mnt)/[\w.-]+|[A-Z]:\\\\Users')


@every
def test_no_path_of_one_machine(nb):
    for c in cells(nb):
        text = source(c) + json.dumps(c.get('outputs', []))
        found = private.search(re.sub(r'"image/png": "[^"]*"', '', text))
        assert not found, f'{nb.name}: {found[0]} exists on one machine only'


link = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"\s]+)"')
written = [sync.root/name for name in ('README.md', 'PAPERS.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]


def prose(page):
    "The Markdown of a page or notebook, without code."
    text = page.read_text(encoding='utf-8')
    if page.suffix == '.ipynb': text = '\n'.join(source(c) for c in cells(page) if c['cell_type'] == 'markdown')
    return re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)


def targets(page):
    "Where the relative links and pictures of a page lead."
    found = [a or b for a, b in link.findall(prose(page))]
    return [target for target in found if not re.match(r'[a-z]+:|#', target)]


def headings(page):
    "Anchors of a notebook, as JupyterLab makes them."
    lines = re.findall(r'^#+ (.*)$', prose(page), re.M)
    return {line.strip().replace(' ', '-') for line in lines}


@pytest.mark.parametrize('page', [*pages, *written], ids=[*ids, *(p.name for p in written)])
def test_links(page):
    "Every relative link and picture of a page leads to a file."
    lost = []
    for target in targets(page):
        name, _, anchor = target.partition('#')
        there = page.parent/name
        if not there.exists() or (anchor and there.suffix == '.ipynb' and anchor not in headings(there)): lost.append(target)
    assert not lost, f'{page.name}: links to {", ".join(lost)}, which are not there'


def test_links_are_seen(tmp_path):
    "Links and pictures in either form; not those in code, and not addresses."
    page = tmp_path/'page.md'
    page.write_text('[a](b.md) ![c](d.png) <img src="e.png"> `[f](g)`\n```sh\n[h](i)\n```\n[j](https://example.org) [k](#k)')
    assert targets(page) == ['b.md', 'd.png', 'e.png']


@pytest.mark.parametrize('there, here', [
    ('![a](../figures/a.png)', '![a](figures/a.png)'),
    ('[b](40_b.ipynb)', '[b](nbs/40_b.ipynb)'),
    ('[c](https://example.org/c) [d](#d)', '[c](https://example.org/c) [d](#d)'),
    ('<img src="../figures/e.png" width="9">', '<img src="figures/e.png" width="9">'),
])
def test_relink(there, here): assert sync.relink(there) == here
