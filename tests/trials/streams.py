"Commands in processes of their own whose output goes to a pipe of another encoding: exit code 0, every file as with UTF-8."
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from row import Row

root = Path(__file__).resolve().parent.parent.parent
ENCODINGS = ['cp1252', 'cp437', 'cp932', 'gbk', 'ascii']
SMALL = '--num-steps 6 --active-steps 2 --num-generations 2 --prompts-per-iteration 1 --eval-size 2 --device cpu'
LINES = {
    'train': f'train {SMALL} --iterations 1 --out run',
    'train --resume': 'train --resume --iterations 2 --out run',
    'demo': 'demo --scale smoke --device cpu',
    'reproduce': 'reproduce entropy_by_step --scale smoke',
    'evaluate': 'evaluate --size 2 --num-steps 4 --device cpu --out scores.csv',
    'sample': 'sample --images 1 --num-steps 4 --device cpu',
    'tune': 'tune --most 2 --device cpu',
    'a refusal': 'train --num-steps many'}
WORKERS = {'reproduce with workers': 'reproduce tau --scale smoke --workers 2'} # takes minutes: in one encoding


def run(
    line:str, # Words after `egrpo`
    encoding:str, # Of its output
    folder, # Where it runs
): # `subprocess.CompletedProcess`
    "A command in a process of its own."
    env = {**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1',
           'EGRPO_FIGURES': str(Path(folder)/'figures')}
    words = [sys.executable, '-m', 'egrpo', *line.split()]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, timeout=600)


def unreadable(
    folder:Path, # What a command has written
)->list: # Names of text files that are no UTF-8
    "Text files in another encoding."
    found = []
    for path in folder.rglob('*'):
        if path.suffix not in ('.json', '.jsonl', '.csv', '.log'): continue
        try: path.read_text(encoding='utf-8')
        except UnicodeDecodeError: found.append(path.name)
    return found


def trials(): # Yields a `Row` for each encoding
    "Every command under every encoding."
    for encoding in ENCODINGS:
        broken = []
        with tempfile.TemporaryDirectory() as folder:
            lines = LINES | (WORKERS if encoding == 'ascii' else {})
            for name, line in lines.items():
                done = run(line, encoding, folder)
                wanted = 2 if name == 'a refusal' else 0
                fine = done.returncode == wanted and b'Traceback' not in done.stderr
                done.stdout.decode(encoding)
                if not fine: broken.append(f'{name}: exit {done.returncode}')
            broken += unreadable(Path(folder))
        yield Row(f'output in {encoding}', len(lines), len(broken), ', '.join(broken))
