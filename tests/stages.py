"Run every check, each to its end, with its time; exit 1 if one failed. pytest comes last: its summary, with its time, closes the output."
import os
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
python = Path(sys.executable).parent

stages = {
    'lint': [python/'ruff', 'check', '--output-format', 'concise'],
    'notebooks': [python/'nbdev_test', '--n_workers', '2'],
    'tests': [python/'pytest', '-n', '2', *sys.argv[1:]],
}
quiet = dict(OMP_NUM_THREADS='1', EGRPO_SCALE='smoke', MPLBACKEND='agg', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
path = os.pathsep.join([str(python), os.environ.get('PATH', '')])


def run(
    name:str, # What to call it
    command:list, # Program and arguments
)->bool: # Did it pass?
    "Run `command` from the repository's root and print how long it took."
    print(f'== {name}', flush=True)
    start = time.monotonic()
    code = subprocess.call([str(c) for c in command], cwd=root, env={**os.environ, **quiet, 'PATH': path})
    if name != 'tests': print(f'== {name}: {"ok" if code == 0 else "FAILED"} in {time.monotonic()-start:.0f} s', flush=True)
    return code == 0


if __name__ == '__main__':
    failed = [name for name, command in stages.items() if not run(name, command)]
    if failed: sys.exit(f'make test: FAILED in {", ".join(failed)}')
