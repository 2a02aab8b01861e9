"""A GPU that is none (`tests/fake_device.py`): the product on two of type cuda, and on one of type mps.

The CPU's kernels compute. So what is found is where tensors lie, in which dtype, and what is asked of torch;
not how a GPU rounds."""
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from row import Row

TESTS = Path(__file__).parent.parent
SMALL = dict(num_steps=6, num_generations=4, active_steps=2, prompts_per_iteration=2, iterations=1, eval_size=2)
GROUP = '--nproc-per-node 2 --master-port 29541'.split()


def trials():
    "Each kind's trials, in one process, then two processes together."
    sys.path.insert(0, str(TESTS))
    from fake_device import COMPILER
    if not COMPILER:
        yield Row('a GPU that is none', 0, 0, 'not tried: no C++ compiler')
        return
    for kind in ('cuda', 'mps'):
        with tempfile.TemporaryDirectory() as out:
            words = [sys.executable, TESTS/'fake_device.py', kind, __file__, kind, out]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=out, env=environment()) as job:
                for line in job.stdout: yield Row(**json.loads(line))
            if job.returncode: yield Row(f'{kind}: all of the above', 1, 1, f'exit code {job.returncode}')
    for name, shared in {'each with the network': 'false', 'sharing the network': 'true'}.items():
        with tempfile.TemporaryDirectory() as out: yield together(name, shared, out)


def environment()->dict:
    "Ours, with egrpo of this checkout and one thread."
    return {**os.environ, 'PYTHONPATH': f'{TESTS.parent}:{TESTS}:{Path(__file__).parent}', 'OMP_NUM_THREADS': '1'}


def options(**settings)->list:
    "Settings of a small run as words of the command line."
    return [word for k, v in (SMALL | settings).items() for word in (f'--{k.replace("_", "-")}', str(v))]


def together(
    name:str, # What is tried
    shared:str, # true or false
    out:str, # A folder
)->Row: # What came of it
    "Two processes on two GPUs, of which each must hold something."
    command = [TESTS/'fake_device.py', 'cuda', '-m', 'egrpo', 'train', *options(tau=0)]
    words = [sys.executable, '-m', 'torch.distributed.run', *GROUP, *command]
    own = environment() | dict(ACCELERATE_USE_FSDP=shared)
    done = subprocess.run([*words, '--out', f'{out}/run'], capture_output=True, text=True, env=own, timeout=900)
    lines = Path(out, 'run/metrics.jsonl').read_text().splitlines() if done.returncode == 0 else []
    figures = f'ratio error {json.loads(lines[0])["ratio_error"]:.1g}' if lines else done.stderr[-300:]
    return Row(f'cuda: two processes, {name}', 1, int(not lines), figures)


# ---- in the process that has the device

def train(out, **settings):
    "A run's trainer and its metrics, an iteration each."
    from egrpo.train.trainer import TrainConfig, Trainer
    trainer = Trainer(TrainConfig(**SMALL | settings, out=str(out)))
    trainer.fit()
    return trainer, [json.loads(line) for line in (Path(out)/'metrics.jsonl').read_text().splitlines()]


def as_on_the_cpu(most, out, **settings):
    "The first iteration's reward and the KL of the second differ from the CPU's by `most` at most."
    settings = dict(iterations=2) | settings
    (_, there), (_, here) = train(out/'there', **settings), train(out/'here', **settings, device='cpu')
    apart = abs(there[0]['reward/verifier'] - here[0]['reward/verifier'])
    assert apart <= most, f'rewards differ by {apart}'
    assert there[0]['ratio_error'] < 1e-4
    return f"reward off by {apart:.1g}, ratio error {there[0]['ratio_error']:.1g}, KL {there[1]['kl']:.1g}"


def resumed(out):
    "GPU, CPU, GPU, an iteration each, against three on the GPU; a dtype that is not named is another on the CPU."
    import pytest
    from safetensors.torch import load_file
    straight = train(out/'straight', iterations=3, dtype='fp32')
    for i, device in enumerate((None, 'cpu', None)):
        train(out/'moved', iterations=i + 1, dtype='fp32', device=device, resume=i > 0)
    one, other = (load_file(out/name/'checkpoint/weights.safetensors') for name in ('straight', 'moved'))
    apart = max(float((one[k] - other[k]).abs().max()) for k in one)
    assert apart < 1e-4, f'weights differ by {apart}'
    if straight[0].policy.device.type == 'cuda':
        train(out/'unnamed')
        with pytest.raises(ValueError, match='dtype'): train(out/'unnamed', iterations=2, device='cpu', resume=True)
    return f'weights off by {apart:.1g} after three iterations'


def full(fake, out):
    "A limit reached while training: one line, exit code 2, a checkpoint from which a smaller micro-batch goes on."
    from egrpo.cli.commands import main
    words = ['train', *options(num_generations=32, tau=0, lora_rank=4), '--out', str(out/'run')]
    gc.collect()
    fake.fake_reset_peak(0)
    assert main(words) == 0
    fake.fake_limit(0, fake.fake_peak(0) * 2 // 3)
    gc.collect()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said: code = main([*words, '--iterations', '2', '--resume'])
        line = said.getvalue().strip().splitlines()[-1]
        assert code == 2 and 'not enough memory for micro_batch' in line, said.getvalue()[-500:]
        gc.collect() # as in a process of its own
        words += ['--iterations', '2', '--resume', '--micro-batch', '2']
        with contextlib.redirect_stderr(io.StringIO()) as said: code = main(words)
        assert code == 0, said.getvalue()[-500:]
    finally: fake.fake_limit(0, 0)
    return line.split('error: ')[1]


def commands(out):
    "The commands that compute."
    from egrpo.cli.commands import main
    folder = str(out/'demo')
    for words in (f'demo --scale smoke --out {folder}', f'sample --model {folder}/model --num-steps 2 --out {out}/grid.png',
                  f'evaluate --model {folder}/model --size 4 --num-steps 2 --rewards clip+preference --out {out}/scores.csv',
                  'tune --lora-rank 2 --most 2', 'reproduce one_step --scale smoke', 'reproduce attention_profile --scale smoke'):
        assert main(words.split()) == 0, words
    return 'demo, sample, evaluate, tune, reproduce'


def pipelines(out):
    "A LoRA and a whole network of each family, checkpointed, saved and loaded."
    from egrpo.models.policy import load_policy
    from egrpo.testing.pipelines import SMALL as FAMILIES
    from egrpo.testing.pipelines import small_pipeline
    for name in FAMILIES:
        small_pipeline(name).save_pretrained(out/name)
        own = dict(model=str(out/name), reward='clip', eval_rewards='clip', guidance=3.)
        train(out/f'{name} lora', **own, lora_rank=2, beta=.1, gradient_checkpointing=True)
        load_policy(own['model'], lora_rank=None, lora_from=out/f'{name} lora/model').encode(['a red circle'])
        train(out/f'{name} whole', **own, text_encoders='offload', vae_tiling=True)
        load_policy(str(out/f'{name} whole/model'), lora_rank=None)
    return ', '.join(FAMILIES)


def cases(kind, fake, out):
    "Name -> function that gives figures, and raises where the promise is broken."
    aegpo = dict(method='aegpo', active_steps=None, num_generations=6, top=2, profile_cache=str(out/'profiles'))
    dropped = dict(text_encoders='drop', embeddings=str(out/'embeddings'))
    branches = dict(method='branch_grpo', num_steps=8, num_generations=4, active_steps=None)
    own = {'training a whole network': {}, 'a LoRA': dict(lora_rank=4), 'AEGPO': aegpo, 'BranchGRPO': branches,
           'KL to the start': dict(beta=.1, lr=1e-3), 'KL of a LoRA': dict(beta=.1, lora_rank=4, lr=1e-3),
           'text encoders offload': dict(text_encoders='offload'), 'text encoders drop': dropped}
    for dtype, most in dict(fp32=1e-3, bf16=.05).items():
        for name, settings in own.items():
            folder = out/f'{name} {dtype}'
            yield f'{name}, {dtype}', lambda: as_on_the_cpu(most, folder, dtype=dtype, **settings) # noqa: B023 run at once
    yield 'fp16', lambda: as_on_the_cpu(.05, out/'fp16', dtype='fp16', lora_rank=4)
    yield f'{kind} → cpu → {kind}', lambda: resumed(out/'resumed')
    yield 'out of memory', lambda: full(fake, out/'full')
    yield 'small pipelines', lambda: pipelines(out/'pipelines')
    yield 'commands', lambda: commands(out/'commands')


def row(
    trial:str, # Its name
    run, # () -> figures
)->dict: # Fields of a `Row`
    "Run a case, silently."
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try: return dict(trial=trial, tried=1, broken=0, figures=run())
        except (Exception, SystemExit) as e: error = e # whatever it is, it is the trial's result
    if os.environ.get('EGRPO_TRIAL'): print(said.getvalue()[-2000:], *traceback.format_exception(error), file=sys.stderr)
    figures = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    return dict(trial=trial, tried=1, broken=1, figures=figures)


def main(kind, out):
    "All cases, a line of JSON each."
    import fake_device
    fake = fake_device.start(kind)
    only = os.environ.get('EGRPO_TRIAL', '')
    for name, run in cases(kind, fake, out):
        if only in name: print(json.dumps(row(f'{kind}: {name}', run)), flush=True)


if __name__ == '__main__': main(sys.argv[1], Path(sys.argv[2]))
