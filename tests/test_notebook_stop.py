"Jupyter's stop button in a real kernel: the run ends with a checkpoint, and the cell fails; `make browser` sees that Run All ends."
import os
import re
import sys
import time

import pytest
from jupyter_client.manager import start_new_kernel

TRAIN = '''
from egrpo import TrainConfig, Trainer
config = TrainConfig(num_generations=2, active_steps=1, num_steps=6, prompts_per_iteration=1, iterations=10000, eval_size=1, out={out!r})
trainer = Trainer(config)
def show(trainer): print('iteration', trainer.iteration, flush=True)
trainer.fit(callback=show)
'''


def outcome(
    client, # Of a kernel
    wait:float, # Seconds at most
    seen=None, # Function of a line of output
)->tuple: # Text of the streams; (name, message) of the error, or None
    "Read what a cell prints until it has ended."
    text, error, end = '', None, time.monotonic() + wait
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=wait)
        kind, content = message['msg_type'], message['content']
        if kind == 'stream':
            text += content['text']
            if seen: seen(text)
        if kind == 'error': error = content['ename'], content['evalue']
        if kind == 'status' and content['execution_state'] == 'idle': return text, error
    raise TimeoutError(text)


@pytest.fixture
def kernel():
    "A fresh kernel."
    manager, client = start_new_kernel(kernel_name='python3', env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_stop_ends_run_all_with_a_checkpoint(kernel, tmp_path):
    manager, client = kernel
    pressed = []
    def press(text):
        if 'iteration 2' in text and not pressed:
            pressed.append(True)
            manager.interrupt_kernel()
    client.execute(TRAIN.format(out=str(tmp_path/'run')))
    text, error = outcome(client, 120, press)
    assert 'press ■ again' in text
    assert error and error[0] == 'KeyboardInterrupt' and 'resume=True' in error[1], error
    done = int(re.search(r'after iteration (\d+) of', error[1])[1])
    state = str(tmp_path/'run/checkpoint/state.json')
    client.execute(f"import json; print(json.load(open({state!r}))['iteration'])")
    text, error = outcome(client, 60)
    assert error is None and int(text) == done
