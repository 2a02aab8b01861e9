"""A GPU that is none: `start('cuda')` or `start('mps')` gives this process tensors of that device type.

torch is a CPU build: they lie in the host's memory and the CPU's kernels compute. But devices are checked as
CUDA does, and float64 is refused as on mps.
From the shell, with a C++ compiler: `python tests/fake_device.py cuda -m egrpo demo --scale smoke`."""
import ctypes
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import types
from contextlib import nullcontext
from functools import cache
from pathlib import Path

os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR') # it warns of kernels that are replaced
import torch # noqa: E402, I001

SOURCE = Path(__file__).with_suffix('.cpp')
COMPILER = shutil.which(os.environ.get('CXX', 'c++'))


def library(
    kind:str, # cuda or mps
)->Path: # The compiled library
    "Compile the device, once for a source and a torch."
    key = hashlib.sha256(f'{torch.__version__} {SOURCE.read_text()}'.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir())/f'egrpo-fake-{kind}-{key}.so'
    if target.exists(): return target
    root, draft = Path(torch.__file__).parent, target.with_suffix(f'.{os.getpid()}')
    headers = [f'-I{root}/include', f'-I{root}/include/torch/csrc/api/include']
    libraries = [f'-L{root}/lib', f'-Wl,-rpath,{root}/lib', '-ltorch', '-ltorch_cpu', '-lc10']
    abi = f'-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}'
    keys = [f'-DFAKE={kind.upper()}', f'-DAUTOGRAD=Autograd{kind.upper()}']
    options = ['-O1', '-w', '-std=c++20', '-shared', '-fPIC', abi, *keys, *headers]
    subprocess.run([COMPILER, *options, str(SOURCE), '-o', str(draft), *libraries], check=True)
    draft.replace(target)
    return target


@cache
def start(
    kind:str='cuda', # cuda or mps
)->ctypes.CDLL: # fake_used(i), fake_peak(i), fake_limit(i, bytes): memory of device i
    "From now on this process has the device."
    path = str(library(kind))
    torch.ops.load_library(path)
    fake = ctypes.CDLL(path)
    fake.fake_used.restype = fake.fake_peak.restype = ctypes.c_int64
    fake.fake_limit.argtypes = ctypes.c_int, ctypes.c_int64
    have = cuda(fake) if kind == 'cuda' else mps(fake)
    for module, names in have.items():
        for name, value in names.items(): setattr(module, name, value)
    return fake


def nothing(*args, **kwargs): pass


class Event:
    "An event on the GPU: the CPU's work is done when it is recorded."
    def __init__(self, **kwargs): self.at = None
    def record(self, stream=None): self.at = time.perf_counter()
    def elapsed_time(self, end): return 1000 * (end.at - self.at)
    synchronize = wait = nothing


class Stream:
    "The one stream, in which everything comes after what was asked for before."
    def __init__(self, *args, **kwargs): pass
    def record_event(self, event=None): return event or Event()
    wait_stream = wait_event = synchronize = nothing


def cuda(
    fake:ctypes.CDLL, # The device
)->dict: # Module -> name -> what it is with the device
    "Functions that `torch.cuda` takes from a CUDA build."
    def at(device=None):
        if isinstance(device, int): return device
        index = None if device is None else torch.device(device).index
        return fake.fake_current() if index is None else index
    def set_device(device):
        if at(device) >= count(): raise RuntimeError('CUDA error: invalid device ordinal')
        fake.fake_exchange(at(device))
    class device:
        "`torch.cuda.device`."
        def __init__(self, device): self.index = at(device)
        def __enter__(self): self.before = fake.fake_exchange(self.index)
        def __exit__(self, *args): fake.fake_exchange(self.before)
    def count(): return fake.fake_count() # torch.compile wants Python's own functions
    def current(): return fake.fake_current()
    def used(device=None): return fake.fake_used(at(device))
    properties = types.SimpleNamespace(name='Fake', major=9, minor=0, total_memory=2**36, multi_processor_count=1)
    generators = tuple(torch.ops.fake_device.generator(i) for i in range(count()))
    have = dict.fromkeys(['synchronize', 'empty_cache', 'ipc_collect', '_lazy_init'], nothing)
    have |= dict(
        is_available=lambda: True, is_initialized=lambda: True, _is_in_bad_fork=lambda: False, _lazy_call=lambda f, **kwargs: f(),
        device_count=count, current_device=current, set_device=set_device, device=device, default_generators=generators,
        Event=Event, Stream=Stream, stream=lambda stream: nullcontext(), current_stream=lambda device=None: Stream(),
        is_current_stream_capturing=lambda: False, is_bf16_supported=lambda including_emulation=True: True,
        get_device_properties=lambda device=None: properties, get_device_name=lambda device=None: 'Fake',
        get_device_capability=lambda device=None: (9, 0), mem_get_info=lambda device=None: (2**36 - used(device), 2**36),
        memory_allocated=used, max_memory_allocated=lambda device=None: fake.fake_peak(at(device)),
        reset_peak_memory_stats=lambda device=None: fake.fake_reset_peak(at(device)))
    inside = {name: value for name, value in have.items() if hasattr(torch.cuda.random, name)}
    group = torch.distributed.init_process_group
    def gloo(backend=None, device_id=None, **kwargs): return group('gloo', **kwargs) # it serves as NCCL does
    return {torch.cuda: have, torch.cuda.random: inside, torch.distributed: dict(init_process_group=gloo)}


def mps(
    fake:ctypes.CDLL, # The device
)->dict: # Module -> name -> what it is with the device
    "Functions that `torch.mps` takes from Apple's build."
    generator = torch.ops.fake_device.generator(0)
    def yes(): return True
    def empty_cache(): fake.fake_reset_peak(0) # till then its driver keeps what was freed
    have = dict(is_available=yes, Event=Event, synchronize=nothing, empty_cache=empty_cache,
                current_allocated_memory=lambda: fake.fake_used(0), driver_allocated_memory=lambda: fake.fake_peak(0),
                recommended_max_memory=lambda: 2**36, _get_default_mps_generator=lambda: generator,
                manual_seed=lambda seed: generator.manual_seed(int(seed)))
    inside = dict(_mps_is_available=yes, _has_mps=True, _mps_is_in_bad_fork=lambda: False)
    return {torch.mps: have, torch.backends.mps: dict(is_available=yes, is_built=yes), torch._C: inside}


if __name__ == '__main__': # python tests/fake_device.py cuda -m module word …, or the path of a script
    import fake_device # noqa: I001 as those who import it will find it
    fake_device.start(sys.argv[1])
    module = sys.argv[2] == '-m'
    sys.argv = sys.argv[3 if module else 2:]
    if module: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else: runpy.run_path(sys.argv[0], run_name='__main__')
