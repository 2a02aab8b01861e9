"Saved notebooks hold what a reader without a kernel can see, and nothing that changes from run to run."
import nbformat
import sync
from nbclient import NotebookClient

CELLS = '''
import sys
import time
from tqdm.auto import tqdm
for _ in tqdm(range(3)): time.sleep(.01)
print('to stderr', file=sys.stderr)
---
from egrpo.show.widgets import explore_merging
explore_merging()
---
6 * 7
'''


def test_a_notebook_that_ran_is_cleaned(tmp_path):
    "Bars, stderr and widgets go; a widget's picture stays."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o.strip()) for o in CELLS.split('---')])
    NotebookClient(nb, kernel_name='python3', timeout=300).execute()
    widget = nb.cells[1].outputs[-1].data
    assert sync.WIDGET in widget and 'image/png' in widget
    path = tmp_path/'ran.ipynb'
    nbformat.write(nb, path)
    sync.tidy(path)
    cells = nbformat.read(path, 4).cells
    assert cells[0].outputs == []
    assert [*cells[1].outputs[-1].data] == ['image/png']
    assert cells[2].outputs[0].data == {'text/plain': '42'}
    text = path.read_text(encoding='utf-8')
    sync.tidy(path)
    assert path.read_text(encoding='utf-8') == text


def test_every_notebook_is_tidy():
    for path in sync.notebooks():
        outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get('outputs', [])]
        assert [sync.kept(o) for o in outputs] == outputs, path.name
