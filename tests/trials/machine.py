"What a machine does to a run: kills, power cuts, full disks, flipped bits, two runs in one folder."
import filecmp
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from row import Row
from safetensors.torch import load_file

from egrpo.cli.commands import main
from egrpo.train.checkpoint import load_checkpoint

KILLS, CUTS, FULL, FLIPS, PAIRS = 121, 77, 46, 60, 10 # as often as when the faults were found
SIZES = {'--num-steps': 6, '--active-steps': 2, '--num-generations': 2, '--prompts-per-iteration': 1, '--eval-size': 2,
         '--eval-every': 0, '--checkpoint-every': 1, '--device': 'cpu'}
small = [str(word) for pair in SIZES.items() for word in pair]
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent.parent.parent)}


def words(out, iterations, *more):
    "A training of a small run."
    return ['train', *small, '--out', str(out), '--iterations', str(iterations), *more]


def start(out, iterations, *more):
    "The same in a process of its own."
    command = [sys.executable, '-m', 'egrpo', *words(out, iterations, *more)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True)


def here(out, iterations, *more):
    "The same in this process: exit code and what it said."
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said): code = main(words(out, iterations, *more))
    return code, said.getvalue()


def weights(out):
    "Trained weights of a run."
    return load_file(Path(out)/'checkpoint/weights.safetensors')


def equal(a, b):
    "Are two runs the same to the bit?"
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(out):
    "Iterations of a run's metrics."
    return [json.loads(line)['iteration'] for line in (out/'metrics.jsonl').read_text().splitlines()]


# ---- kills

def kills(tmp, rng):
    "Runs of eight iterations, each killed at random moments until it is through, beside one that nobody kills."
    began = time.monotonic()
    start(tmp/'straight', 8).communicate()
    whole = time.monotonic() - began # with all that a process imports
    killed = runs = broken = tracebacks = 0
    while killed < KILLS:
        out, begun = tmp/f'killed{runs}', False
        while True:
            with start(out, 8, *(['--resume'] if begun else [])) as process:
                try: _, err = process.communicate(timeout=rng.uniform(.3, 1.1) * whole)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    _, err = process.communicate()
                    killed += 1
            tracebacks += 'Traceback' in err
            if process.returncode != -signal.SIGKILL: break
            begun = any((out/name).exists() for name in ('metrics.jsonl', 'checkpoint', 'checkpoint.old'))
        runs += 1
        broken += process.returncode != 0 or logged(out) != [*range(8)] or not equal(out, tmp/'straight')
        shutil.rmtree(out)
    figures = f'{runs} runs, all equal to a straight one but {broken}'
    return Row('kills (SIGKILL at random moments)', killed, broken + tracebacks, figures)


# ---- power cuts

@contextmanager
def image(tmp, megabytes, *options):
    "Inside: an ext4 file system in a file, mounted; the file and the folder."
    file, place = tmp/'disk.img', tmp/'disk'
    place.mkdir(exist_ok=True)
    with file.open('wb') as f: f.truncate(megabytes << 20)
    subprocess.run(['mkfs.ext4', '-q', file], check=True, capture_output=True)
    subprocess.run(['mount', '-o', ','.join(['loop', *options]), file, place], check=True, capture_output=True)
    try: yield file, place
    finally: subprocess.run(['umount', place], check=True)


def snapshot(file, copy, process):
    "Copy a live disk at one moment, while the run is held: what the system has not written yet is lost, as in a power cut."
    process.send_signal(signal.SIGSTOP)
    try:
        while True:
            shutil.copyfile(file, copy)
            if filecmp.cmp(file, copy, shallow=False): return # nothing was written meanwhile: it is one moment
    finally: process.send_signal(signal.SIGCONT)


def recovered(copy, place):
    "The iteration of the checkpoint in a copy of the disk; None where none can be loaded."
    subprocess.run(['mount', '-o', 'loop', copy, place], check=True, capture_output=True) # replays the journal
    try: return load_checkpoint(place/'run/checkpoint')[1]['iteration']
    except ValueError: return None
    finally: subprocess.run(['umount', place], check=True)


def power_cuts(tmp, rng):
    "Copies of a live disk while a run trains on it; each must hold a checkpoint as new as the last that was complete."
    name = 'power cuts (copies of a live ext4)'
    if os.geteuid() or not shutil.which('mkfs.ext4'): return Row(name, 0, 0, 'skipped: needs root and mkfs.ext4')
    lost = late = 0
    (tmp/'look').mkdir()
    with image(tmp, 200, 'commit=1') as (file, place):
        with start(place/'run', 100000) as process:
            while not (place/'run/metrics.jsonl').exists(): time.sleep(.05)
            for _ in range(CUTS):
                time.sleep(rng.uniform(.2, 1.5))
                done = complete(place/'run/checkpoint')
                snapshot(file, tmp/'copy.img', process)
                found = recovered(tmp/'copy.img', tmp/'look')
                lost += found is None
                late += None not in (found, done) and found < done
            process.kill()
    return Row(name, CUTS, lost + late, f'{lost} without a checkpoint, {late} older than the last complete one')


def complete(folder):
    "The iteration of the checkpoint that has its name at this moment; None while it is replaced."
    try: return json.loads((folder/'state.json').read_text())['iteration']
    except (OSError, ValueError): return None


# ---- full disks

def full_disks(tmp, rng):
    "A disk with ever more space left, from none: a line, the last checkpoint is whole, and with space the run goes on."
    name = 'full disks (ext4)'
    if os.geteuid() or not shutil.which('mkfs.ext4'): return Row(name, 0, 0, 'skipped: needs root and mkfs.ext4')
    here(tmp/'straight', 3)
    broken = refused = 0
    usage = shutil.disk_usage
    with image(tmp, 240) as (_, place):
        out, filler = place/'run', place/'filler'
        for left in range(FULL):
            shutil.rmtree(out, ignore_errors=True)
            here(out, 1)
            fill(filler, usage(place).free - left * 1_000_000)
            shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40) # the disk fills up after the check
            try: code, said = here(out, 3, '--resume')
            finally: shutil.disk_usage = usage
            refused += code == 2
            whole = load_checkpoint(out/'checkpoint')[1]['iteration'] >= 1
            filler.unlink()
            again = here(out, 3, '--resume')[0] == 0 and equal(out, tmp/'straight')
            broken += code not in (0, 2) or 'Traceback' in said or not whole or not again
    figures = f'{refused} were refused in a line, all then ended as a straight run but {broken}'
    return Row(name, FULL, broken, figures)


def fill(path, size):
    "Write a file of a size, about."
    with path.open('wb') as f:
        try:
            for _ in range(max(size, 0) // (1 << 16)): f.write(bytes(1 << 16))
        except OSError: pass


# ---- damage

def flips(tmp, rng):
    "One flipped bit in a file of a run of a LoRA with kept embeddings: refused, or without effect."
    more = ['--lora-rank', '2', '--embeddings', str(tmp/'embeddings')]
    here(tmp/'begun', 2, *more)
    shutil.copytree(tmp/'begun', tmp/'straight')
    here(tmp/'straight', 3, *more, '--resume')
    files = [tmp/'begun/metrics.jsonl', *(tmp/'begun/checkpoint').iterdir(), *(tmp/'embeddings').iterdir()]
    silent = refused = tracebacks = 0
    for path in itertools.islice(itertools.cycle(sorted(files)), FLIPS):
        kept = path.read_bytes()
        content = bytearray(kept)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        out = shutil.copytree(tmp/'begun', tmp/'flipped')
        code, said = here(out, 3, *more, '--resume')
        tracebacks += 'Traceback' in said
        refused += code == 2
        silent += code == 0 and not equal(out, tmp/'straight')
        shutil.rmtree(out)
        path.write_bytes(kept)
    figures = f'{refused} refused in a line, {FLIPS - refused - silent} without effect, {silent} silent'
    return Row('flipped bits', FLIPS, silent + tracebacks, figures)


# ---- two at once

def pairs(tmp, rng):
    "Two trainings begun in one folder at about the same time: one runs, the other is refused."
    broken = 0
    for i in range(PAIRS):
        out = tmp/f'pair{i}'
        first = start(out, 6)
        time.sleep(rng.uniform(0, 2))
        second = start(out, 6)
        errors = [p.communicate()[1] for p in (first, second)]
        codes = sorted(p.returncode for p in (first, second))
        lines = len((out/'metrics.jsonl').read_text().splitlines()) if (out/'metrics.jsonl').exists() else 0
        broken += codes != [0, 2] or lines != 6 or any('Traceback' in e for e in errors)
    return Row('two trainings in one folder', PAIRS, broken, 'one runs, the other is refused in a line')


def trials():
    "All of them, each in a folder of its own."
    torch.set_num_threads(1)
    for trial in (flips, pairs, full_disks, power_cuts, kills):
        with tempfile.TemporaryDirectory() as tmp: yield trial(Path(tmp), random.Random(0))
