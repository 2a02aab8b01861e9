"""Everything that a borrowed GPU is asked, in one command: `make gpu-check`, or
`python tests/gpu_check.py --out DIR --minutes 9 --stages about,flux,jobs`.

Each stage is a process with a time limit and a log; one that fails does not stop the next. What comes back is made
for a narrow way out: DIR/gpu_check.json (a record), logs.tar.gz and cells_0.tar.gz, …, all rewritten as results come.
`EGRPO_FAKE_GPU=1` rehearses it, with `--size tiny`, on the GPU that is none of `fake_device.py`."""
import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path: sys.path.insert(0, str(folder))

LIMITS = dict(about=45, tests=100, attention=45, flux=110, speed=45, jobs=600) # seconds of each stage, at most
PACKED_BYTES = 14 * 2**20 # of a tar file, compressed
PACKED_FILES = 6 # at most so many of them
RESERVE = 15 # seconds kept at the end for packing


def begin():
    "Start the fake GPU where one is rehearsed on."
    if not os.environ.get('EGRPO_FAKE_GPU'): return
    import fake_device
    fake_device.start('cuda')


# ---- what is kept

def plain(
    value, # Numbers, strings, lists and dicts
):
    "The same without what a record refuses: numbers that are not finite, folders of this machine."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(o) for o in value]
    if isinstance(value, float) and not math.isfinite(value): return None
    return re.sub(r'(?<!\w)/[^\s\'":,;)]*/', '', value) if isinstance(value, str) else value


class Results:
    "A stage's figures, written whenever one is added."
    def __init__(self,
        path, # File to write
    ): self.path, self.figures, self.failed = Path(path), {}, []

    def add(self, **figures):
        "Add figures; print them, too."
        self.figures |= plain(figures)
        print(json.dumps(plain(figures), default=str), flush=True)
        draft = self.path.with_suffix('.draft')
        draft.write_text(json.dumps(self.figures, default=str), encoding='utf-8')
        draft.replace(self.path)

    def measure(self,
        name:str, # What to call it
        run, # () -> the figure
    ):
        "Add what a measurement gives; where it fails, say why and go on."
        try: self.add(**{name: run()})
        except Exception as e:
            traceback.print_exc()
            self.failed.append(name)
            self.add(**{name: dict(error=f'{type(e).__name__}: {e}'[:600])})


@dataclass
class Stage:
    "What a stage is given."
    size:str # tiny or full
    work:Path # Folder to work in
    out:Path # Folder of what comes back
    until:float # Seconds since 1970 at which it is ended
    workers:int # Processes of the stage `jobs`
    results:Results # What it finds

    @property
    def tiny(self): return self.size == 'tiny'

    @property
    def left(self): return self.until - time.time()


# ---- stages

def about(
    stage:Stage, # What it is given
):
    "The machine: versions, memory, seconds of imports, speed of matrix products."
    began = time.perf_counter()
    import torch
    imported = time.perf_counter()
    import egrpo.paper.experiments  # noqa: F401
    stage.results.add(import_seconds=dict(torch=imported - began, egrpo=time.perf_counter() - imported))
    from egrpo.paper.records import versions
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    stage.results.add(
        device=torch.cuda.get_device_name(index), memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count, cores=os.cpu_count(), cuda=torch.version.cuda,
        versions=versions(), tf32_before_a_policy_is_loaded=tf32())
    if shutil.which('nvidia-smi'):
        asked = '--query-gpu=driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit'
        said = subprocess.run(['nvidia-smi', asked, '--format=csv'], capture_output=True, text=True, timeout=30)
        stage.results.add(nvidia_smi=said.stdout.split('\n')[:2])
    side = 256 if stage.tiny else 8192
    for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items():
        stage.results.measure(f'matmul_tflops_{name}', lambda dtype=dtype: matmul_tflops(side, dtype))


def tf32()->dict: # matmul, convolutions -> bool
    "Say whether torch may round fp32 to TF32."
    import torch
    return dict(matmul=torch.backends.cuda.matmul.allow_tf32, convolutions=torch.backends.cudnn.allow_tf32)


def matmul_tflops(
    side:int, # Of the square matrices
    dtype, # Of their numbers
)->float: # Tera floating-point operations a second, the median of seven products
    "Speed of a matrix product on random numbers."
    import torch

    from egrpo.train.timing import time_in_turns
    a, b = (torch.randn(side, side, device='cuda', dtype=dtype) for _ in range(2))
    seconds = time_in_turns(dict(product=lambda: a @ b), 7, 'cuda')['product']
    return 2 * side**3 / sorted(seconds)[3] / 1e12


class Outcomes:
    "A plugin of pytest that keeps what tests say."
    def __init__(self,
        results:Results, # Is added to
    ): self.results, self.outcomes, self.measured, self.failures = results, {}, [], {}

    def pytest_runtest_logreport(self, report):
        "Keep a report, of a call or of a fixture that failed or skipped."
        if report.when != 'call' and report.passed: return
        name = report.nodeid.split('/')[-1]
        self.outcomes[name] = report.outcome
        self.measured += [value for key, value in report.user_properties if key == 'measured']
        if report.failed: self.failures[name] = str(report.longrepr)[-600:]
        self.results.add(outcomes=self.outcomes, measured=self.measured, failures=self.failures)


def tests(
    stage:Stage, # What it is given
):
    "The tests that need a GPU."
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # deterministic products, before CUDA starts
    import pytest
    files = [str(HERE/f'test_{name}.py') for name in ('gpu', 'attention')]
    words = ['-k', 'cuda or gpu', '-v', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--rootdir', str(ROOT), '--durations=10']
    code = pytest.main([*files, *words], plugins=[Outcomes(stage.results)])
    if code: raise SystemExit(f'pytest ended with {int(code)}')


def attention(
    stage:Stage, # What it is given
):
    "Attention entropy beside attention, in the shape of FLUX.1-dev at 1024 px."
    import torch

    from egrpo.paper import attention_cost as benchmark
    shape = (1, 2, 128, 32) if stage.tiny else (1, 24, 4608, 128)
    results = stage.results
    results.measure('attention', lambda: benchmark._attention_part(shape, 7, 'cuda', torch.bfloat16))
    results.measure('subsets', lambda: subset_seconds(shape))
    results.measure('memory', lambda: attention_memory((64,) if stage.tiny else (1024, 2048, 4096, 8192)))


def subset_seconds(
    shape:tuple, # (B,H,N,D)
)->dict: # plain, every_1, every_4, every_16 -> seconds
    "Time attention beside its entropy of all queries and of some."
    import torch

    from egrpo.core.attention import attention_entropy, query_subset
    from egrpo.paper import attention_cost as benchmark
    q, k, v = benchmark._inputs(shape, 'cuda', torch.bfloat16)
    contenders = dict(plain=benchmark.attention_contenders(q, k, v)['plain'])
    for every in (1, 4, 16):
        some = query_subset(shape[2], every).cuda() if every > 1 else None
        contenders[f'every_{every}'] = lambda some=some: attention_entropy(q, k, queries=some)
    return benchmark.time_in_turns(contenders, 20, 'cuda')


def attention_memory(
    tokens:tuple, # Numbers of tokens
)->dict: # contender -> tokens -> bytes
    "Memory of attention, of its entropy and of the matrix, above the inputs."
    from egrpo.paper import attention_cost as benchmark
    found = {}
    for name in ('plain', 'entropy', 'matrix'):
        few = [n for n in tokens if name != 'matrix' or n <= benchmark.MATRIX_LIMIT]
        found[name] = {n: benchmark._contender_memory(name, (1, 24, n, 128), 'cuda', 'bfloat16') for n in few}
    return found


def flux_pipeline(): # A FluxPipeline on the GPU, in bf16
    "FLUX.1-dev's transformer and VAE with random weights, and small text encoders of the right widths."
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from egrpo.testing.pipelines import small_clip, small_clip_tokenizer, small_t5, small_t5_tokenizer
    from egrpo.train.cost import architecture
    known = architecture('flux.1-dev')
    text = [small_clip(768, False), small_clip_tokenizer(), small_t5(4096), small_t5_tokenizer(512)]
    for encoder in text[::2]: encoder.to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device('cuda'):
            transformer = FluxTransformer2DModel(**known.network[1]).eval()
            vae = AutoencoderKL(**known.vae[1], sample_size=1024, scaling_factor=.3611, shift_factor=.1159).eval()
    finally: torch.set_default_dtype(torch.float32)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.), vae, *text, transformer)


def flux_policy(
    stage:Stage, # What it is given
)->tuple: # The policy, the settings of `TrainConfig` that it has
    "A policy of FLUX.1-dev's size with a LoRA; of a small one where all is tiny."
    from egrpo.models.families import FluxPolicy
    from egrpo.testing.pipelines import small_pipeline
    model, resolution, rank = 'flux.1-dev', 720, 32
    if stage.tiny:
        model, resolution, rank = str(stage.work/'flux'), 32, 4
        small_pipeline('flux-dev').save_pretrained(model)
    settings = dict(resolution=resolution, lora_rank=rank, micro_batch=4, gradient_checkpointing=True,
                    text_encoders='offload', dtype='bf16', device='cuda')
    pipeline = small_pipeline('flux-dev') if stage.tiny else flux_pipeline()
    return FluxPolicy(pipeline, **settings), settings | dict(model=model)


def mean_brightness(
    images, # (B,3,H,W) in [0, 1]
    prompts, # B prompts
): # (B,) scores
    "A reward that costs nothing."
    return images.mean((1, 2, 3))


def flux(
    stage:Stage, # What it is given
):
    "E-GRPO on FLUX.1-dev's size: seconds, memory beside the prediction, what recording and compiling change."
    import torch

    from egrpo.train.cost import iteration_seconds, probe, run_memory
    from egrpo.train.prepare import iteration_nfe
    from egrpo.train.trainer import TrainConfig, Trainer
    began = time.perf_counter()
    policy, settings = flux_policy(stage)
    stage.results.add(build_seconds=time.perf_counter() - began, held_bytes=torch.cuda.memory_allocated(),
                      latent_shape=policy.latent_shape, trained=sum(p.numel() for p in policy.parameters().values()))
    seconds = {n: probe(policy, n, repeats=1) for n in (1, 4)}
    stage.results.add(seconds_of_one={n: vars(s) for n, s in seconds.items()})
    few = dict(num_steps=6, active_steps=2) if stage.tiny else {}
    config = TrainConfig(**settings, **few, tau=2.2, shift=3., prompts_per_iteration=1, ema_decay=0., lr=2e-6,
                         out=str(stage.work/'flux_run'))
    def cost(n): return sum(iteration_seconds(replace(config, num_generations=n), seconds[4]).values())
    fitting = [n for n in ((4,) if stage.tiny else (12, 8, 4)) if cost(n) < stage.left - 30]
    config = replace(config, num_generations=(fitting or [2])[0])
    stage.results.add(num_generations=config.plan['num_generations'], nfe=iteration_nfe(config),
                      predicted_seconds=iteration_seconds(config, seconds[4]))
    stage.results.measure('iteration', lambda: flux_iteration(Trainer(config, policy, mean_brightness)))
    stage.results.measure('predicted_bytes', lambda: run_memory(config))
    stage.results.measure('recording', lambda: recording_seconds(policy))
    if stage.left > 25: stage.results.measure('without_checkpointing', lambda: without_checkpointing(policy))
    if stage.left > 60 and not stage.tiny:
        stage.results.measure('compiled', lambda: compiled_seconds(policy, seconds[4]))


def flux_iteration(
    trainer, # A `Trainer`
)->dict: # seconds, peak_bytes, and the iteration's metrics
    "Time an iteration and see how much memory it takes at most."
    import torch
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    metrics = trainer.step(0)
    seconds = time.perf_counter() - began
    trainer.optimizer.zero_grad()
    return dict(seconds=seconds, peak_bytes=torch.cuda.max_memory_allocated(),
                **{k: v for k, v in metrics.items() if isinstance(v, (int, float))})


def recording_seconds(
    policy, # A policy
)->dict: # plain, every_1, every_4, every_16 -> seconds of a forward pass of one latent
    "Time a forward pass with and without recording attention entropy."
    from egrpo.models.recorder import record_attention_entropy
    from egrpo.train.cost import _batch
    from egrpo.train.timing import time_in_turns
    batch = _batch(policy, 1)
    def recorded(every):
        "A recorded pass."
        with record_attention_entropy(policy.transformer, every=every): policy.velocity(*batch)
    contenders = dict(plain=lambda: policy.velocity(*batch))
    for every in (1, 4, 16): contenders[f'every_{every}'] = lambda every=every: recorded(every)
    return time_in_turns(contenders, 3, policy.device)


def without_checkpointing(
    policy, # A policy
)->dict: # Seconds of one latent, and bytes above what is held
    "Measure a gradient without gradient checkpointing, one latent at a time."
    from egrpo.train.cost import probe
    from egrpo.train.timing import highest_rise
    policy.transformer.disable_gradient_checkpointing()
    try: seconds, rise = highest_rise(lambda: probe(policy, 1, repeats=1), policy.device)
    finally: policy.transformer.enable_gradient_checkpointing()
    return dict(vars(seconds), bytes=rise)


def compiled_seconds(
    policy, # A policy; its blocks are compiled
    plain, # `Seconds` without
)->dict: # first: seconds of compiling, forward, backward, image: of one latent, times as fast
    "Compile the network's blocks and measure again."
    from egrpo.models.precision import compile_blocks
    from egrpo.train.cost import probe
    began = time.perf_counter()
    compile_blocks(policy.transformer, policy.device)
    probe(policy, 4, repeats=1)
    first = time.perf_counter() - began
    seconds = probe(policy, 4, repeats=1)
    return dict(vars(seconds), first=first, forward_ratio=plain.forward / seconds.forward,
                backward_ratio=plain.backward / seconds.backward)


def speed(
    stage:Stage, # What it is given
):
    "The miniature: seconds of an iteration by prompts, dtype and micro-batch."
    from egrpo.models.policy import load_policy
    latents = load_policy(lora_rank=None, device='cuda').micro_batch
    alone = [(1, 'fp32', 1)] # as public code does it, sample by sample
    cases = [(prompts, 'fp32', latents) for prompts in (4, 16, 64)]
    larger = [(16, 'fp32', MICRO_BATCH), (64, 'fp32', MICRO_BATCH), (16, 'bf16', MICRO_BATCH)]
    for prompts, dtype, micro_batch in [(2, 'fp32', latents)] if stage.tiny else cases + larger + alone:
        if stage.left < 8: break
        name = f'{prompts} prompts, {dtype}, micro-batch {micro_batch}'
        stage.results.measure(name, lambda case=(prompts, dtype, micro_batch): miniature_speed(stage, *case))
    stage.results.add(tf32_once_a_policy_is_loaded=tf32())


def miniature_speed(
    stage:Stage, # What it is given
    prompts:int, # Prompts of an iteration
    dtype:str, # Of the network
    micro_batch:int, # Most latents in a forward pass
)->dict: # Means over iterations after the first: seconds, of rollout, reward and update, nfe; ratio_error, bytes
    "Time iterations of the miniature."
    import torch

    from egrpo.train.trainer import TrainConfig, Trainer
    few = dict(num_generations=2, active_steps=1, num_steps=6) if stage.tiny else {}
    where = dict(device='cuda', out=str(stage.work/'speed'), eval_size=2)
    config = TrainConfig(**few, **where, prompts_per_iteration=prompts, dtype=dtype, micro_batch=micro_batch,
                         reward='preference')
    trainer, seconds, metrics = Trainer(config), [], []
    torch.cuda.reset_peak_memory_stats()
    for i in range(3):
        began = time.perf_counter()
        metrics.append(trainer.step(i))
        seconds.append(time.perf_counter() - began)
        if stage.left < seconds[-1] + 2: break
    last = metrics[-1]
    parts = {k: last[f'seconds_{k}'] for k in ('rollout', 'reward', 'update')}
    return dict(parts, first=seconds[0], seconds=seconds[-1], nfe=last['nfe_rollout'] + last['nfe_gradient'],
                ratio_error=last['ratio_error'], bytes=torch.cuda.max_memory_allocated())


# ---- jobs: the list

MICRO_BATCH = 2048 # latents of the miniature in a forward pass: a GPU wants more than a CPU; no part of a cell's key

@dataclass(frozen=True)
class Job:
    "Something for a worker to do: train a cell, or call a function."
    name:str # Of its file, without suffix: letters, digits, '_' and '-'
    kind:str # Jobs of a kind take about equally long
    seed:int=0 # Jobs of smaller seeds come first
    config:object=None # A `TrainConfig`: its cell is trained
    call:str='' # Else 'module:function', called with `arguments`; what it returns is kept as JSON
    arguments:dict=field(default_factory=dict) # Of the function


def cell(
    kind:str, # What it is called in the table: grid and setting
    config, # A `TrainConfig`; computed in fp32 with TF32 off, as cells are on a CPU
)->Job: # The job
    "A job that trains a cell."
    from egrpo.train.run import cell_key
    config = replace(config, dtype='fp32', device='cuda', micro_batch=MICRO_BATCH)
    return Job(cell_key(config), kind, config.seed, config)


# (grid, seeds) in the order of `egrpo.paper.registered`; what is there already is not done again
ORDER = (('step_weights', 8), ('methods', 8), ('aegpo', 6), ('allocation', 6), ('explored', 6), ('on_egrpo', 8),
         ('step_weights', 12), ('methods', 12), ('methods_clip', 8), ('aegpo', 8), ('allocation', 8), ('explored', 8),
         ('on_egrpo', 12), ('methods_clip', 12))
TOGETHER = dict(methods='step_weights', allocation='aegpo', explored='aegpo') # done in step, seed by seed


def registered_jobs()->list: # Jobs
    "Cells of the registered grids at scale gpu."
    from egrpo.paper.experiments import registered
    grids, found = registered('gpu'), {}
    phases = {}
    for name, seeds in ORDER:
        phase = phases.setdefault((TOGETHER.get(name, name), seeds), 1000 * (len(phases) + 1))
        for setting, configs in grids[name].items():
            for config in configs:
                job = cell(f'{name}: {setting}', config)
                first = found.get(job.name)
                if config.seed < 100 + seeds and first is None: found[job.name] = replace(job, seed=phase + config.seed)
    return [*found.values()]


def record_of(
    name:str, # A measurement's, in `egrpo.paper.experiments.EXPERIMENTS`
    scale:str, # Name of the scale
)->dict: # Its record
    "Measure, and return the record."
    from egrpo.paper.experiments import reproduce
    from egrpo.paper.records import load_record
    with tempfile.TemporaryDirectory() as folder:
        return load_record(reproduce(name, scale, 0, path=f'{folder}/{name}.json'))


def jobs(
    size:str, # tiny or full
)->list: # Jobs; smaller seeds are done first, and else the order is kept
    "List what the GPU computes: probes, the gradient's signal, then the registered grids."
    from egrpo.paper.records import get_scale
    from egrpo.paper.signal_settings import signal_settings
    if size == 'tiny': return rehearsal()
    probes = [Job(f'record_{name}', name, 0, call='gpu_check:record_of', arguments=dict(name=name, scale='mini'))
              for name in ('peaks', 'learning_value')]
    where = dict(device='cuda', micro_batch=MICRO_BATCH)
    names = list(signal_settings(get_scale('mini')))
    signal = [Job(f'signal_{i}', f'signal {name}', 1, call='egrpo.paper.signal_settings:signal_of_setting',
                  arguments=dict(name=name, scale='mini', **where)) for i, name in enumerate(names)]
    return probes + signal + registered_jobs()


def rehearsal()->list: # Jobs: two cells, a function, and one that fails
    "The list of the size tiny."
    from egrpo.train.trainer import TrainConfig
    few = dict(num_steps=6, active_steps=1, num_generations=2, prompts_per_iteration=1, iterations=1, eval_size=2,
               eval_every=0, reward='preference')
    cells = [cell('small', TrainConfig(**few, seed=seed)) for seed in (1, 0)]
    versions = Job('versions', 'versions', call='egrpo.paper.records:versions')
    return [*cells, versions, Job('failing', 'failing', seed=2, call='egrpo.paper.records:get_scale', arguments=dict(name='huge'))]


# ---- jobs: their workers

def perform(
    job:Job, # What to do
    folder:Path, # Of finished cells
):
    "Do a job and keep what it gives, whole or not at all."
    from egrpo.base.files import write_text
    from egrpo.paper.cells import run_cell, save_cell
    path = folder/f'{job.name}.json'
    if job.config is not None: return save_cell(run_cell(job.config), path)
    module, name = job.call.split(':')
    found = getattr(importlib.import_module(module), name)(**job.arguments)
    write_text(path, json.dumps(plain(found)))


def work(
    connection, # To whom hands out jobs
    folder:Path, # Of finished cells
    log:Path, # File for what is printed
):
    "Import once, then do job after job."
    began = time.perf_counter()
    with open(log, 'a', encoding='utf-8', buffering=1) as f, redirect_stdout(f), redirect_stderr(f):
        begin()
        import torch

        import egrpo.paper.experiments  # noqa: F401
        torch.set_num_threads(1)
        connection.send(('', time.perf_counter() - began, ''))
        for job in iter(connection.recv, None):
            began, error = time.perf_counter(), ''
            try: perform(job, folder)
            except Exception as e:
                traceback.print_exc(file=f)
                error = f'{type(e).__name__}: {e}'
            connection.send((job.name, time.perf_counter() - began, error))


@dataclass
class Worker:
    "A process that does jobs."
    process:object # Of multiprocessing
    connection:object # To it
    job:Job|None=None # What it does
    idle:bool=False # Has it imported all and nothing to do?


def start_worker(
    number:int, # Its number
    folder:Path, # Of finished cells
    logs:Path, # Folder of logs
)->Worker: # The worker
    "Start a worker."
    context = multiprocessing.get_context('spawn')
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, folder, logs/f'worker_{number}.log'), daemon=True)
    process.start()
    there.close() # so that its end is seen here
    return Worker(process, here)


class Crew:
    "Workers, and who does what."
    def __init__(self,
        stage:Stage, # Where to work, and how many workers
        until:float, # Seconds since 1970 at which the last job must have ended
    ):
        self.todo, self.until = [], until # jobs, in order
        self.folder, self.logs = stage.work/'cells', stage.work/'logs'
        for path in (self.folder, self.logs): path.mkdir(parents=True, exist_ok=True)
        self.durations, self.failed, self.done, self.late, self.started = {}, {}, 0, 0, 0
        self.workers = [self.new_worker() for _ in range(stage.workers)]

    def new_worker(self)->Worker: # It
        "Start one more worker."
        self.started += 1
        return start_worker(self.started, self.folder, self.logs)

    def next_job(self)->Job|None: # None where none can end in time
        "Take the first job that can end in time, by the slowest of its kind so far."
        left = self.until - time.time()
        for i, job in enumerate(self.todo):
            if max(self.durations.get(job.kind, [0])) <= left: return self.todo.pop(i)

    def hand_out(self):
        "Give every idle worker a job; those that get none have done their work."
        for worker in self.workers:
            if not worker.idle: continue
            worker.job = self.next_job()
            worker.idle = False
            try: worker.connection.send(worker.job)
            except OSError: pass # it has died, which is heard next
        self.workers = [w for w in self.workers if w.job or w.process.is_alive()]

    def hear(self,
        worker:Worker, # Has said something, or ended
    ):
        "Note what a worker has done; one that died is replaced."
        try: name, seconds, error = worker.connection.recv()
        except (EOFError, OSError):
            self.bury(worker)
            return
        worker.idle = True
        if not worker.job: return # it has only begun
        if error: self.failed[name] = error
        else:
            self.done += 1
            self.durations.setdefault(worker.job.kind, []).append(seconds)
        worker.job = None

    def bury(self,
        worker:Worker, # Whose process has ended
    ):
        "Take a worker from the list; if it died at a job, note that and start another."
        self.workers.remove(worker)
        worker.process.join(1)
        if not worker.job: return
        self.failed[worker.job.name] = f'its process ended with exit code {worker.process.exitcode}'
        if self.started < 100: self.workers.append(self.new_worker())

    def run(self,
        notice, # Called every 30 seconds and at the end
    ):
        "Work until nothing is left to do, or no time."
        last = time.time()
        try:
            while self.workers and time.time() < self.until:
                self.hand_out()
                by_connection = {w.connection: w for w in self.workers}
                heard = wait(list(by_connection), min(5, max(.1, self.until - time.time())))
                for connection in heard: self.hear(by_connection[connection])
                if time.time() - last < 30: continue
                notice()
                last = time.time()
        finally:
            self.late = sum(w.job is not None for w in self.workers)
            for worker in self.workers: worker.process.kill()
            notice()


def pack(
    files:list, # To be packed
    out:Path, # Folder of what comes back
    stem:str, # Of the tar files
    draft:Path, # Folder for those that are not finished
)->list: # Their names
    "Pack files into as few tar files as their limit allows; each is whole or as it was before."
    names, waiting = [], sorted(files)
    while waiting and len(names) < PACKED_FILES:
        name = f'{stem}_{len(names)}.tar.gz'
        with open(draft/name, 'wb') as raw, tarfile.open(fileobj=raw, mode='w:gz', compresslevel=6) as tar:
            while waiting and raw.tell() < PACKED_BYTES:
                path = waiting.pop(0)
                tar.add(path, path.name)
        shutil.copyfile(draft/name, out/f'.{name}')
        (out/f'.{name}').replace(out/name)
        names.append(name)
    return names


def do_jobs(
    stage:Stage, # What it is given
):
    "Train cells, and whatever else is in `jobs`, by processes that share the GPU."
    began = time.time()
    crew = Crew(stage, stage.until - RESERVE) # its workers import while the list is made
    crew.todo = sorted(jobs(stage.size), key=lambda job: job.seed)
    planned = len(crew.todo)
    def notice():
        "Pack what is finished and say how far the work is."
        finished = [p for p in crew.folder.iterdir() if p.suffix in ('.json', '.png')]
        kinds = {k: dict(jobs=len(o), mean_seconds=sum(o) / len(o)) for k, o in crew.durations.items()}
        stage.results.add(planned=planned, done=crew.done, failed=crew.failed, left=len(crew.todo),
                          ended_unfinished=crew.late, workers=stage.workers, kinds=kinds,
                          seconds=time.time() - began, packed=pack(finished, stage.out, 'cells', stage.work))
    crew.run(notice)
    if not crew.done: raise SystemExit('no job was done: see worker_1.log')


STAGES = dict(about=about, tests=tests, attention=attention, flux=flux, speed=speed, jobs=do_jobs)


# ---- all of it

def figure(
    name:str, # A stage
    found:dict, # What it found
)->str: # For the table
    "The one figure of a stage that says most."
    try:
        if name == 'about': return f"{found['device']}, bf16 {found['matmul_tflops_bf16']:.3g} TFLOP/s"
        if name == 'tests': return f"{list(found['outcomes'].values()).count('passed')} of {len(found['outcomes'])} passed"
        if name == 'attention':
            plain_seconds, entropy = (sorted(found['subsets'][k])[10] for k in ('plain', 'every_1'))
            return f"entropy takes {entropy / plain_seconds:.3g} times attention"
        if name == 'flux':
            seconds, peak = found['seconds_of_one']['4']['forward'], found['iteration']['peak_bytes']
            counted = sum(found['predicted_bytes'].values())
            return f'{seconds:.3g} s an evaluation, peak {peak / 2**30:.3g} GiB, counted {counted / 2**30:.3g}'
        if name == 'speed':
            seconds = {k: v['seconds'] for k, v in found.items() if 'seconds' in v}
            return f'{min(seconds.values()):.3g} to {max(seconds.values()):.3g} s an iteration'
        return f"{found['done']} of {found['planned']} jobs done, {len(found['failed'])} failed"
    except (KeyError, IndexError, TypeError): return ''


def last_words(
    log:Path, # A log
)->str: # Its last line that is not empty
    "The last line of a log."
    lines = [line for line in log.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
    return plain(lines[-1][:300]) if lines else ''


def run_stage(
    name:str, # A stage
    limit:float, # Seconds
    args, # The command line
    folder:Path, # Folder to work in
)->dict: # ok, seconds, error, found
    "Run a stage in a process of its own, which is ended with all its children when its time is over."
    log = folder/'logs'/f'{name}.log'
    words = ['--stage', name, '--until', str(time.time() + limit), '--work', str(folder), '--out', str(args.out),
             '--size', args.size, '--workers', str(args.workers)]
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get('PYTHONPATH')]))
    threads = 1 if name == 'jobs' or args.size == 'tiny' else 4
    quiet = dict(PYTHONPATH=path, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                 MPLBACKEND='agg', PYTHONUNBUFFERED='1')
    began, error = time.time(), ''
    with log.open('w', encoding='utf-8') as f:
        process = subprocess.Popen([sys.executable, str(HERE/'gpu_check.py'), *words], stdout=f, stderr=f,
                                   cwd=ROOT, env={**os.environ, **quiet}, start_new_session=True)
        try:
            if process.wait(limit): error = f'exit code {process.returncode}'
        except subprocess.TimeoutExpired: error = f'ended after its {limit:.0f} s'
        finally: end_group(process)
    result = folder/f'{name}.json'
    found = json.loads(result.read_text(encoding='utf-8')) if result.exists() else {}
    if error: error = f'{error}: {last_words(log)}'
    return dict(ok=not error, seconds=round(time.time() - began, 1), error=error, found=found)


def end_group(
    process, # A `Popen` in a session of its own
):
    "End a process and its children."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass # all have ended
    process.wait()


def write_all(
    rows:dict, # Stage -> what `run_stage` gave
    args, # The command line
    folder:Path, # Folder to work in
    began:float, # Seconds since 1970
):
    "Write the record and the logs; called after every stage."
    logs = sorted((folder/'logs').glob('*.log'))
    pack(logs, args.out, 'logs', folder)
    scale = 'smoke' if args.size == 'tiny' else 'gpu'
    command = f'make gpu-check ARGS="--minutes {args.minutes:g}"'
    path, data = args.out/'gpu_check.json', dict(size=args.size, stages=rows)
    wall_time = round(time.time() - began, 1)
    try:
        from egrpo.paper.records import save_record
        save_record(path, data, scale=scale, seeds=[], nfe=0, wall_time=wall_time, command=command)
    except Exception: # rather no record than no numbers
        traceback.print_exc()
        path.write_text(json.dumps(data, default=str), encoding='utf-8')


def table(
    rows:dict, # Stage -> what `run_stage` gave
)->str: # Lines
    "The short table at the end."
    lines = [f"{'stage':10} {'ok':4} {'seconds':>8}  figure"]
    for name, row in rows.items():
        ok, said = ('yes', figure(name, row['found'])) if row['ok'] else ('NO', row['error'])
        lines.append(f"{name:10} {ok:4} {row['seconds']:8.1f}  {said}")
    return '\n'.join(lines)


def limits(
    text:str, # 'flux=60,tests=30', or nothing
)->dict: # Stage -> seconds
    "The stages' limits, with some changed."
    changed = dict(o.split('=') for o in text.split(',') if o)
    return LIMITS | {name: float(seconds) for name, seconds in changed.items()}


def parse(
    words=None, # The command line; None = this process's
): # A namespace
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='folder of what comes back')
    parser.add_argument('--minutes', type=float, default=9, help='for all stages together')
    parser.add_argument('--stages', default=','.join(STAGES), help='some of them, in this order')
    parser.add_argument('--size', choices=('tiny', 'full'), default='full')
    parser.add_argument('--workers', type=int, default=2, help='processes of the stage jobs; they take turns, so many do not help')
    parser.add_argument('--limits', type=limits, default=LIMITS, help="other limits in seconds, 'flux=60,tests=30'")
    for inner in ('--stage', '--until', '--work'): parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    unknown = [o for o in args.stages.split(',') if o not in STAGES]
    if unknown: parser.error(f"stages must be some of {', '.join(STAGES)}, got {unknown[0]!r}")
    args.out = args.out.resolve()
    return args


def main(
    args, # The command line
)->int: # 1 if a stage failed
    "Run the stages, each to its end or its limit."
    began = time.time()
    until = began + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    folder, rows = Path(tempfile.mkdtemp(prefix='gpu_check_')), {}
    (folder/'logs').mkdir()
    for name in args.stages.split(','):
        limit = min(args.limits[name], until - time.time() - 3)
        if limit < 1: rows[name] = dict(ok=False, seconds=0., error='no time was left', found={})
        else: rows[name] = run_stage(name, limit, args, folder)
        print(table(rows).splitlines()[-1], flush=True)
        write_all(rows, args, folder, began)
    print(f'\n{table(rows)}', flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return int(not all(row['ok'] for row in rows.values()))


def run_inner(
    args, # The command line of a stage
):
    "Be a stage."
    begin()
    folder = Path(args.work)
    results = Results(folder/f'{args.stage}.json')
    STAGES[args.stage](Stage(args.size, folder, args.out, float(args.until), args.workers, results))
    if results.failed: sys.exit(f"failed: {', '.join(results.failed)}")


if __name__ == '__main__':
    given = parse()
    if given.stage: run_inner(given)
    else:
        begin()
        sys.exit(main(given))
