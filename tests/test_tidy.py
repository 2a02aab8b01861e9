"Saved notebooks hold what a reader without a kernel can see, and nothing that changes from run to run."
import os
import subprocess
import sys

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


LOADS = '''
import warnings
import diffusers.utils.logging as ours, transformers.utils.logging as theirs
before = [(o.get_verbosity(), o.is_progress_bar_enabled()) for o in (ours, theirs)]
from egrpo import TrainConfig, Trainer, load_policy
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.cost import run_memory
policy = load_policy(device='cpu', lora_rank=2)
with warnings.catch_warnings(record=True) as said: policy.encode(['a fox ' * 50])
assert 'longer than the' in str(said[0].message), said # egrpo's own word is heard
small_pipeline('chroma')
run_memory(TrainConfig(model='flux.1-dev', resolution=720))
assert before == [(o.get_verbosity(), o.is_progress_bar_enabled()) for o in (ours, theirs)]
'''


def test_libraries_are_silent_while_egrpo_loads():
    "Neither bars nor warnings of diffusers and transformers; afterwards both talk as before."
    done = subprocess.run([sys.executable, '-c', LOADS], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    assert (done.returncode, done.stderr) == (0, '')
