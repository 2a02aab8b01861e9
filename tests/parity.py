"""Does the general policy do what each pipeline of diffusers does? `make parity` asks all families and writes figures/parity.json.

For a family: its pipeline's own images against Euler's steps with the policy's velocity, the velocities at the levels that its solver
visits, the ratio of the first update, and a LoRA trained here in a plain pipeline. For families with a class of their own, that against
the general policy. Names as arguments ask some families only; the record keeps the others."""
import contextlib
import io
import math
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import diffusers
import pandas as pd
import torch
import transformers

from egrpo.core.loss import loss_metrics
from egrpo.core.rollout import rollout, transition_log_prob
from egrpo.core.sde import ode_step
from egrpo.methods.registry import make_plan
from egrpo.models.entrance import guidance_words
from egrpo.models.general import GeneralPolicy
from egrpo.models.newer_families import Flux2Policy
from egrpo.models.policy import load_policy
from egrpo.paper.records import load_record, record_path, save_record
from egrpo.testing.pipelines import NEWER, small_pipeline
from egrpo.train.trainer import TrainConfig, Trainer

PROMPTS = ['a red cube', 'two blue spheres and a dog']
STEPS, GUIDANCE = 5, 3.
SIDES = {'lumina2': 64, 'ltx-video': 64} # pixels; the others have 32
SHORT = dict(num_frames=5) # of videos
CALLS = {'wan2.1': SHORT, 'wan2.2': SHORT, 'wan2.2-5b': SHORT, 'ltx-video': dict(num_frames=9),
         'hunyuan-video': SHORT | dict(max_sequence_length=300), 'lumina2': dict(max_sequence_length=400)} # as long as small encoders read
FAST = ('flux-dev', 'sd3', 'sd3.5', 'flux2-dev', 'flux2-klein', 'qwen-image', 'z-image') # with a class of their own


@dataclass
class Parity:
    "What was found for a family."
    family:str
    pipeline:str # Its class
    latents:str # Shape of one image's latents, as the policy sees them
    evaluations:int # Network evaluations for a velocity
    solver:str # The pipeline's scheduler
    velocity:float # Largest difference of velocities at the solver's own levels
    images:float|None # Largest difference of images; None where the solver is not Euler's
    ratio_error:float # Of the first update
    lora_moved:float # Largest change of the velocity by a LoRA of three iterations
    lora:float # Largest difference in a plain pipeline with that LoRA: of images, or velocities


def inputs(policy, levels=(.9, .4, .9, .9)):
    "Latents of several levels and prompts of unlike length."
    cond = policy.encode([*PROMPTS, 'a cat'])
    rows = torch.tensor([0, 1, 2, 0])
    noise = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor(levels), cond[rows]


def velocity(policy, *args):
    "The velocity at `args`, or else at `inputs`."
    with torch.no_grad(): return policy.velocity(*(args or inputs(policy)))


def moved(policy, scale=.1):
    "The policy, with parameters that are a little elsewhere, as if it were trained."
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters().values(): p.add_(scale * torch.randn(p.shape, generator=rng))
    return policy


def general_policy(name, **how):
    "The general policy of a small pipeline."
    how = dict(lora_rank=None, resolution=SIDES.get(name, 32), guidance=GUIDANCE, device='cpu', call=CALLS.get(name)) | how
    return GeneralPolicy(small_pipeline(name), **how)


def visited(pipeline, policy, prompt):
    "Images of a pipeline's own call, and what its scheduler is given on the way: (velocity, time, latents)."
    seen, own = [], pipeline.scheduler.step
    @wraps(own)
    def step(velocity, t, latents, *args, **kwargs):
        seen.append((velocity.clone(), float(t), latents.clone()))
        return own(velocity, t, latents, *args, **kwargs)
    asked = policy.entrance.asked | guidance_words(policy.entrance.takes, GUIDANCE, [' '])
    with patch.object(pipeline.scheduler, 'step', step):
        out = pipeline(prompt=[prompt], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3), output_type='pt', **asked)
    return out.frames if hasattr(out, 'frames') else out.images, seen


def is_euler(pipeline): return type(pipeline.scheduler).__name__ == 'FlowMatchEulerDiscreteScheduler'


@torch.no_grad()
def differences(policy, pipeline, prompt=PROMPTS[1]):
    "Largest difference of velocities, and of images where the solver is Euler's."
    theirs, seen = visited(pipeline, policy, prompt)
    cond, sigmas = policy.encode([prompt]), policy.sigmas(STEPS)
    apart = 0.
    for k, (velocity, t, latents) in enumerate(seen):
        level = sigmas[k] if is_euler(pipeline) else torch.tensor(t / 1000)
        ours = policy.velocity(latents.float(), level[None], cond)
        apart = max(apart, (ours - velocity).abs().max().item())
    if not is_euler(pipeline): return apart, None
    x = seen[0][2].float()
    for s, s_next in zip(sigmas, sigmas[1:]): x = ode_step(policy.velocity(x, s[None], cond), x, s.item(), s_next.item())
    return apart, (policy.decode(x) - theirs.float()).abs().max().item()


def ratio_error(policy):
    "Error of the ratio at the first update: the update's own forward against the rollout's log-probs."
    plan = make_plan('egrpo', num_steps=STEPS, num_generations=3, active_steps=2, shift=policy.sigmas(STEPS))
    cond = policy.encode(PROMPTS)
    out = rollout(policy, cond, plan, 0, 0)
    with torch.no_grad(): velocity = policy.velocity(out.parents, plan.sigmas[out.start], cond[out.prompt])
    log_prob, *_ = transition_log_prob(velocity, out.parents, out.children, out.row, out.start, out.end, plan)
    return float(loss_metrics(log_prob, out.log_prob)['ratio_error'])


def brightness(images, prompts): return images.flatten(1).mean(1)


def train(policy, folder, iterations=3, **changes):
    "Some iterations of E-GRPO; the folder of the LoRA."
    prompts = Path(folder)/'prompts.txt'
    prompts.write_text('\n'.join(PROMPTS) + '\n')
    settings = dict(model='small', num_steps=STEPS, active_steps=2, num_generations=3, prompts_per_iteration=2, iterations=iterations,
                    prompts=str(prompts), eval_size=2, eval_every=0, lr=1e-2, ema_decay=0., lora_rank=policy.lora_rank, device='cpu',
                    out=f'{folder}/run')
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(TrainConfig(**settings | changes), policy, brightness)
        trainer.fit()
    return trainer


def load_loras(pipeline, folder):
    "Load what a policy saved as a user of plain diffusers would."
    pipeline.load_lora_weights(str(folder))
    second = Path(folder)/'transformer_2'
    if second.exists(): pipeline.load_lora_weights(str(second), load_into_transformer_2=True)


def ask(name):
    "Ask a family everything."
    policy = general_policy(name, lora_rank=2)
    velocity, images = differences(policy, policy.pipeline) # a new LoRA changes nothing
    plain = general_policy(name)
    with tempfile.TemporaryDirectory() as folder:
        error = ratio_error(policy)
        train(policy, folder)
        moved, _ = differences(policy, plain.pipeline)
        load_loras(plain.pipeline, f'{folder}/run/model')
    trained = differences(policy, plain.pipeline)
    solver = type(policy.pipeline.scheduler).__name__.removesuffix('Scheduler')
    return Parity(name, type(policy.pipeline).__name__, str(policy.latent_shape), policy.nfe_per_velocity, solver, velocity, images, error,
                  moved, trained[0] if images is None else trained[1])


def packed(policy, latents):
    "Latents of a class of its own as the family's pipeline has them."
    pack = policy.pipeline._pack_latents if hasattr(policy.pipeline, '_pack_latents') else None
    if isinstance(policy, Flux2Policy): return pack(latents)
    return pack(latents, *latents.shape) if pack else latents


def timed(policy, latents, repeats):
    "Velocities of two prompts of unlike length at two levels, and the least processor time that they took."
    cond, levels, times = policy.encode(PROMPTS * 2), torch.tensor([.9, .9, .4, .4]), []
    for _ in range(repeats):
        began = time.process_time()
        with torch.no_grad(): v = policy.velocity(latents, levels, cond)
        times.append(time.process_time() - began)
    return v, min(times)


def fast_path(name, repeats=5, resolution=32):
    "The class of its own against the general one: largest difference of velocities and images, and how much faster it is."
    fast = load_policy(small_pipeline(name), 'cpu', lora_rank=None, guidance=GUIDANCE, resolution=resolution)
    general = general_policy(name, resolution=resolution, call=dict(max_sequence_length=fast.text_length))
    assert torch.equal(fast.sigmas(STEPS), general.sigmas(STEPS))
    noise = torch.randn(4, *fast.latent_shape, generator=torch.Generator().manual_seed(0))
    (ours, short), (theirs, long) = timed(fast, noise, repeats), timed(general, packed(fast, noise), repeats)
    assert fast.nfe == general.nfe
    images = fast.decode(noise) - general.decode(packed(fast, noise))
    return max((packed(fast, ours) - theirs).abs().max().item(), images.abs().max().item()), long / short


def bound(x):
    "The power of ten above a rounding error, so that another machine finds the same."
    return x if not x else float(f'1e{math.ceil(math.log10(x))}')


def known():
    "What the record holds: families, classes of their own, seconds."
    if not record_path('parity').exists(): return {}, {}, 0.
    record = load_record('parity')
    return {o['family']: o for o in record['data']['families']}, record['data']['fast'], record['wall_time']


def keep(families, fast, seconds):
    "Write the record."
    order = [name for name in NEWER if name in families]
    data = dict(families=[families[name] for name in order], fast={name: fast[name] for name in FAST if name in fast})
    save_record('parity', data, scale='smoke', seeds=[0], wall_time=60. * math.ceil(seconds / 60), nfe=0, command='make parity',
                device='cpu', claim="the general policy gives what each pipeline gives, and classes of their own what it gives")


def main(names):
    "Ask families, all or those that are named; the record keeps what it holds of the others."
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    families, fast, before = known()
    began = time.time()
    for name in names or [*NEWER, *FAST[:3]]:
        wrong = False
        if name in NEWER:
            row = ask(name)
            print(pd.DataFrame([asdict(row)]).to_string(index=False), flush=True)
            wrong = row.velocity or row.images or row.ratio_error > 1e-6 or row.lora > 1e-5
            rounded = dict(ratio_error=bound(row.ratio_error), lora=bound(row.lora), lora_moved=bound(row.lora_moved))
            families[name] = asdict(row) | rounded
        if name in FAST:
            apart, faster = fast_path(name)
            print(f'{name}: own class against the general one {apart:.1e}, {faster:.1f} times as fast', flush=True)
            wrong = wrong or apart > 5e-6
            fast[name] = dict(difference=bound(apart), faster=round(faster, 1))
        if wrong: sys.exit(f'not equal: {name}')
        keep(families, fast, before + time.time() - began)


if __name__ == '__main__': main(sys.argv[1:])
