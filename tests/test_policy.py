"Real pipeline classes, small: loading, sampling as diffusers does, guidance, LoRA, embeddings, memory savers, training."
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.testing import assert_close

from egrpo.core.diffusion import chord_sigma
from egrpo.core.entropy import merge_lengths
from egrpo.core.plan import Branch, Plan, SDEStep, describe, rollout_nfe
from egrpo.core.rollout import rollout
from egrpo.core.sde import ode_step
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.registry import METHODS
from egrpo.models.device import is_out_of_memory
from egrpo.models.families import SD3Policy
from egrpo.models.lora import add_lora
from egrpo.models.pipeline import limit_hub_waiting, load_pipeline
from egrpo.models.policy import load_policy, model_sigmas
from egrpo.models.recorder import record_attention_entropy
from egrpo.rewards.reward import get_reward
from egrpo.testing.pipelines import SMALL, small_pipeline
from egrpo.train.evaluate import sample_images
from egrpo.train.prepare import describe_run, training_nfe
from egrpo.train.trainer import TrainConfig, Trainer

PROMPTS = ['a red circle', 'two blue squares']
every = pytest.mark.parametrize('name', SMALL)
UNETS = ('sd1.5', 'sd2', 'sdxl')


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "Every small pipeline as a folder of diffusers' layout."
    base = tmp_path_factory.mktemp('pipelines')
    for name in SMALL: small_pipeline(name).save_pretrained(base/name)
    return base


@pytest.fixture
def load(folders):
    "A policy by name, on the CPU."
    return lambda name, *args, **kwargs: load_policy(str(folders/name), 'cpu', None, *args, **kwargs)


def noise_of(policy, n=2):
    "The same noise every time."
    return torch.randn(n, *policy.latent_shape, generator=torch.Generator().manual_seed(0))


def schedule(policy, steps=5):
    "Noise levels that diffusers can be told to use as well."
    if not hasattr(policy, 'angles'): return flow_sigmas(steps)
    scheduler = ddim(policy.pipeline, steps)
    return torch.cat([chord_sigma(policy.angles[scheduler.timesteps], policy.angles[-1]), torch.zeros(1)])


def ddim(pipeline, steps=5):
    "The pipeline's own schedule, from its last timestep to the image."
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing='trailing', set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


def ours(policy, prompts=PROMPTS, steps=5):
    "Images by our ODE."
    sigmas, x, cond = schedule(policy, steps), noise_of(policy, len(prompts)), policy.encode(prompts)
    with torch.no_grad():
        for s, s_next in zip(sigmas, sigmas[1:]): x = ode_step(policy.velocity(x, s.expand(len(x)), cond), x, s, s_next)
    return policy.decode(x)


def theirs(pipeline, policy, prompts=PROMPTS, steps=5, **kwargs):
    "Images by a plain call of the pipeline, on the same noise."
    x = noise_of(policy, len(prompts))
    if hasattr(policy, 'angles'): pipeline.scheduler = ddim(pipeline)
    else: kwargs.update(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), max_sequence_length=policy.text_length)
    if 'Flux' in type(pipeline).__name__: x = pipeline._pack_latents(x, *x.shape)
    return pipeline(prompts, num_inference_steps=steps, height=16, width=16, latents=x, output_type='pt', guidance_scale=policy.guidance,
                    **kwargs).images


# ---- sampling

@pytest.mark.parametrize('name, guidance', [(name, g) for name in SMALL for g in (1., 4.)])
def test_samples_as_diffusers_does(load, folders, name, guidance):
    policy = load(name, guidance=guidance)
    plain = load_pipeline(str(folders/name))
    assert_close(ours(policy), theirs(plain, policy), atol=2e-4, rtol=0)


@pytest.mark.parametrize('name', [n for n in SMALL if n != 'flux-schnell'])
def test_guidance_is_used(load, name):
    a, b = (ours(load(name, guidance=g)) for g in (2., 7.))
    assert (a - b).abs().max() > 1e-4


@every
def test_every_evaluation_is_counted(load, name):
    "Predicted and measured agree, up to the factor the policy states; the network's own calls agree with both."
    from egrpo.methods.registry import egrpo
    policy, plan, calls = load(name, guidance=3.), egrpo(num_steps=6, active_steps=2, num_generations=3), []
    policy.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(len(args[0] if args else kwargs['hidden_states'])), with_kwargs=True)
    rollout(policy, policy.encode(PROMPTS), plan, 0, 0)
    factor = 1 if name.startswith('flux') else 2
    assert policy.nfe_per_velocity == factor
    assert policy.nfe == sum(calls) == 2 * rollout_nfe(plan) * factor


@every
@pytest.mark.parametrize('micro_batch', [1, 3])
def test_micro_batches_change_nothing(load, name, micro_batch):
    policy = load(name, guidance=3.)
    x, s, cond = noise_of(policy, 4), torch.tensor([1., .7, .4, .05]), policy.encode(PROMPTS * 2)
    with torch.no_grad(): whole = policy.velocity(x, s, cond)
    policy.micro_batch = micro_batch
    with torch.no_grad(): assert_close(policy.velocity(x, s, cond), whole, atol=float(2e-6 * whole.abs().max()), rtol=1e-5)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='before torch 2.9')
@pytest.mark.parametrize('where, name, value', [(torch.backends.cudnn, 'allow_tf32', True), (torch.backends, 'fp32_precision', 'tf32'),
                                                (torch.backends.cudnn.conv, 'fp32_precision', 'tf32')], ids=['old', 'all', 'conv'])
def test_convolutions_in_fp32_are_exact(where, name, value):
    "Whichever way TF32 was allowed; and torch's old answer still agrees with the new one, or it raises."
    try:
        setattr(where, name, value)
        assert torch.backends.cudnn.conv.fp32_precision == 'tf32'
        SD3Policy(small_pipeline('sd3'), device='cpu', dtype='fp32')
        assert torch.backends.cudnn.conv.fp32_precision == 'ieee' and not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.fp32_precision = 'none'
        torch.backends.cudnn.allow_tf32 = False


# ---- memory

@pytest.mark.parametrize('error, full', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True),
    (RuntimeError('MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB).'), True),
    (RuntimeError('Invalid buffer size: 64.00 GiB'), True), (RuntimeError('CUDA error: out of memory'), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), True),
    (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), True),
    (RuntimeError('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'), True), (MemoryError(), True),
    (RuntimeError('CUDA error: CUBLAS_STATUS_NOT_INITIALIZED'), False),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)'), False), (ValueError('out of memory'), False)], ids=str)
def test_full_devices_are_told_from_other_errors(error, full):
    assert is_out_of_memory(error) == full


# ---- loading

def test_what_cannot_be_loaded(folders, tmp_path):
    "A folder with a part missing, cut short, in pickles only, or of another kind of model: one line that says which."
    import shutil
    def broken(spoil):
        shutil.copytree(folders/'sd3', tmp_path/spoil.__name__)
        spoil(tmp_path/spoil.__name__)
        with pytest.raises(ValueError) as error: load_policy(str(tmp_path/spoil.__name__), 'cpu')
        assert '\n' not in str(error.value) and str(error.value).startswith(f"model '{tmp_path}")
        return str(error.value)
    def missing(folder): shutil.rmtree(folder/'transformer')
    def short(folder):
        file = folder/'transformer/diffusion_pytorch_model.safetensors'
        file.write_bytes(file.read_bytes()[:-100])
    def pickled(folder):
        file = folder/'transformer/diffusion_pytorch_model.safetensors'
        torch.save({}, file.with_suffix('.bin'))
        file.unlink()
    def another(folder):
        index = json.loads((folder/'model_index.json').read_text())
        (folder/'model_index.json').write_text(json.dumps({**index, '_class_name': 'DDPMPipeline'}))
    for spoil in (missing, short, pickled, another): broken(spoil)


def test_time_limit_keeps_the_client_of_a_user():
    "A proxy, a header or certificates of their own stay, and a time limit they have chosen."
    client = type(get_session())(headers={'x-mine': 'yes'}, timeout=7, event_hooks={'request': [partial(print)]})
    set_client_factory(lambda: client)
    try:
        limit_hub_waiting(1), limit_hub_waiting(2)
        assert get_session() is client
        asked = [client.build_request('GET', 'http://hub', **o) for o in ({}, dict(timeout=None))]
        assert asked[0].headers['x-mine'] == 'yes' and len(client.event_hooks['request']) == 2
        for request in asked: client.event_hooks['request'][1](request)
        assert [{*o.extensions['timeout'].values()} for o in asked] == [{7}, {2}]
    finally: set_client_factory(default_client_factory)


@pytest.mark.parametrize('name, side, says', [
    ('flux-dev', 18, 'multiple of 4'), ('sd1.5', 17, 'multiple of 2'), ('sd3', 18, 'multiple of 4'), ('sd3', 68, 'at most 64, got 68')])
def test_sides_that_do_not_fit(load, name, side, says):
    with pytest.raises(ValueError, match=f'resolution must be .*{says}'): load(name, resolution=side)


@pytest.mark.parametrize('name, side', [('flux-dev', 64), ('sd3', 64), ('sd1.5', 34), ('sdxl', 48)])
def test_other_sides(load, name, side):
    policy = load(name, resolution=side)
    assert ours(policy).shape == (2, 3, side, side)


def test_other_families_are_named(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=('DownBlock2D',) * 2,
                       up_block_types=('UpBlock2D',) * 2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='DDPMPipeline, which has no encode_prompt: name a text-to-image flow'): load_policy(str(tmp_path))


REAL = { # configurations of the published transformers, and how many linear layers a LoRA finds in them
    'FLUX.1-dev': (FluxTransformer2DModel, dict(guidance_embeds=True), 19 * 12 + 38 * 5),
    'Stable Diffusion 3.5 medium': (SD3Transformer2DModel, dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm='rms_norm',
        dual_attention_layers=tuple(range(13))), 24 * 12 - 3 + 13 * 4),
    'Stable Diffusion XL': (UNet2DConditionModel, dict(
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        down_block_types=('DownBlock2D',) + ('CrossAttnDownBlock2D',) * 2, up_block_types=('CrossAttnUpBlock2D',) * 2 + ('UpBlock2D',),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816), 70 * 10 + 11),
}


@pytest.mark.parametrize('name', REAL)
def test_lora_layers_of_the_published_sizes(name):
    "The real architectures, without their weights: which layers a LoRA is put on."
    kind, config, expected = REAL[name]
    with torch.device('meta'):
        model = kind(**config)
        add_lora(model, 2, 0)
    assert len({n.split('.lora_')[0] for n, _ in model.named_parameters() if '.lora_' in n}) == expected


# ---- LoRA

def moved(policy, scale=.05):
    "A policy whose LoRA has been moved, as if it were trained."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters().values(): p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy


def test_a_new_lora_leaves_gpus_alone(load, monkeypatch):
    "With several of them, forking the state of each would ask for a choice."
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('GPUs were seeded'))
    before = torch.get_rng_state()
    first, again = (load('flux-dev', 2, seed=3).parameters() for _ in range(2))
    assert all(torch.equal(p, again[n]) for n, p in first.items()) and torch.equal(torch.get_rng_state(), before)


TARGETS = {'flux-dev': 'FluxSingleTransformerBlock', 'sd3': ['attn.to_q', 'to_v'], 'sd1.5': 'to_q,to_k'}


@pytest.mark.parametrize('name', TARGETS)
def test_lora_of_other_layers_and_scale_loads_in_plain_diffusers(load, folders, tmp_path, name):
    "Layers named by a block's class, a list or a text, with an alpha of its own: few layers, the images of training."
    policy = moved(load(name, 4, guidance=4., lora_alpha=2., lora_targets=TARGETS[name]))
    assert 0 < len(policy.parameters()) < len(load(name, 4).parameters())
    assert policy.transformer.peft_config['default'].lora_alpha == 2
    policy.save(tmp_path)
    plain = load_pipeline(str(folders/name))
    bare = theirs(plain, policy)
    plain.load_lora_weights(str(tmp_path))
    assert torch.allclose(theirs(plain, policy), theirs(policy.pipeline, policy), atol=1e-5)
    assert not torch.allclose(bare, theirs(policy.pipeline, policy), atol=1e-3)


@every
def test_lora_loads_in_plain_diffusers(load, folders, tmp_path, name):
    "Saved by us, loaded by `pipe.load_lora_weights(folder)`: the images of training, not those of the bare model."
    policy = moved(load(name, 4, guidance=4.))
    policy.save(tmp_path)
    plain = load_pipeline(str(folders/name))
    bare = theirs(plain, policy)
    plain.load_lora_weights(str(tmp_path))
    assert_close(ours(policy), theirs(plain, policy), atol=2e-4, rtol=0)
    assert (ours(policy) - bare).abs().max() > 2e-3


@every
def test_lora_from_elsewhere_is_the_start(load, folders, tmp_path, name):
    "A LoRA that plain diffusers and peft made: the first images are its, training moves it, the reference stays."
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    plain = load_pipeline(str(folders/name))
    network = 'unet' if name in UNETS else 'transformer'
    model = getattr(plain, network)
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=['to_q', 'to_v'], init_lora_weights=False))
    plain.save_lora_weights(tmp_path, **{f'{network}_lora_layers': get_peft_model_state_dict(model),
                                         f'{network}_lora_adapter_metadata': model.peft_config['default'].to_dict()})
    policy = load(name, lora_from=tmp_path, guidance=4.)
    start = theirs(plain, policy)
    assert policy.lora_rank == 3 and all('.lora_' in n for n in policy.parameters())
    assert_close(ours(policy), start, atol=2e-4, rtol=0)
    moved(policy)
    assert (ours(policy) - start).abs().max() > 2e-3
    with policy.reference(): assert_close(ours(policy), start, atol=2e-4, rtol=0)
    policy.save(tmp_path/'trained')
    again = load(name, lora_from=tmp_path/'trained'/'pytorch_lora_weights.safetensors', guidance=4.)
    assert_close(ours(again), ours(policy), atol=2e-4, rtol=0)


def test_lora_in_other_programs_names(load, tmp_path):
    "A FLUX LoRA under kohya's names, with its own alpha, is the LoRA it says it is."
    from safetensors.torch import save_file
    generator, layer = torch.Generator().manual_seed(0), 'lora_unet_double_blocks_0_img_attn_proj'
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    tensors = {'lora_down.weight': down, 'lora_up.weight': up, 'alpha': torch.tensor(1.)}
    save_file({f'{layer}.{k}': t for k, t in tensors.items()}, tmp_path/'k.safetensors')
    policy, bare = load('flux-dev', lora_from=tmp_path/'k.safetensors'), load('flux-dev')
    with torch.no_grad(): bare.transformer.transformer_blocks[0].attn.to_out[0].weight += up @ down / 2 # alpha / rank
    assert_close(ours(policy), ours(bare), atol=2e-4, rtol=0)


def test_lora_that_does_not_fit_is_refused(load, folders, tmp_path):
    policy = moved(load('flux-dev', 4))
    policy.save(tmp_path)
    for source, says in [(tmp_path/'none', 'does not exist'), (tmp_path, '24 of its 34 tensors have a place')]:
        with pytest.raises(ValueError, match=says): load('sd3', lora_from=source)
    with pytest.raises(ValueError, match='lora_rank is 8, lora_from has rank 4'): load('flux-dev', 8, lora_from=tmp_path)
    (tmp_path/'old.bin').write_bytes(b'')
    with pytest.raises(ValueError, match='no .safetensors file'): load('flux-dev', lora_from=tmp_path/'old.bin')


def test_pickles_are_not_opened(load, tmp_path):
    "A folder that holds a pickle alone is refused, and the pickle does not run."
    class Bomb:
        def __reduce__(self): return (tmp_path/'ran').touch, ()
    torch.save({'x.lora': Bomb()}, tmp_path/'pytorch_lora_weights.bin')
    with pytest.raises(ValueError, match='lora_from'): load('flux-dev', lora_from=tmp_path)
    assert not (tmp_path/'ran').exists()


def test_text_lora_is_refused(load, folders, tmp_path):
    "What we would not save again, we do not load."
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    plain = load_pipeline(str(folders/'flux-dev'))
    for model in (plain.transformer, plain.text_encoder):
        targets = ['to_q'] if model is plain.transformer else ['q_proj']
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    layers = get_peft_model_state_dict(plain.transformer), get_peft_model_state_dict(plain.text_encoder)
    plain.save_lora_weights(tmp_path, *layers)
    with pytest.raises(ValueError, match='text_encoder'): load('flux-dev', lora_from=tmp_path)


# ---- prompts

@every
def test_embeddings_are_found_again(load, tmp_path, monkeypatch, name):
    "A second policy reads the folder and embeds nothing; the images are the same to the bit."
    first = load(name, embeddings=tmp_path, guidance=4.)
    images = ours(first)
    second = load(name, embeddings=tmp_path, guidance=4.)
    monkeypatch.setattr(type(second), '_embed', lambda self, prompt: pytest.fail(f'{prompt!r} was embedded again'))
    assert torch.equal(ours(second), images)
    assert len(list(tmp_path.glob('*.safetensors'))) == 2 + (first.nfe_per_velocity == 2) == len(list(tmp_path.iterdir()))


def test_embeddings_of_another_model_are_not_taken(folders, tmp_path):
    "The same prompts, two models, one folder."
    small_pipeline('flux-dev', seed=1).save_pretrained(tmp_path/'other')
    a, b = (load_policy(str(f), 'cpu', embeddings=tmp_path/'kept').encode(PROMPTS) for f in (folders/'flux-dev', tmp_path/'other'))
    assert len(list((tmp_path/'kept').iterdir())) == 4 and not torch.equal(a.embeds, b.embeds)


@pytest.mark.parametrize('name, limit', [('flux-dev', 24), ('sd3', 24), ('sd1.5', 16)])
def test_prompts_that_are_too_long_are_counted_once(load, name, limit):
    "By the text encoder that reads most; one that just fits is not meant. The embedding says that the rest was not read."
    policy, known = load(name), load(name)
    ids = getattr(policy.pipeline, sorted(n for n in policy.pipeline.components if n.startswith('tokenizer'))[-1])
    long = next(p for p in ('a ' * n for n in range(1, 99)) if len(ids(p).input_ids) > limit)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        known.encode([long[:-2]]), policy.encode(PROMPTS)
        assert not [o for o in said if 'prompts' in str(o.message)]
        cond = policy.encode(['a circle', long * 2 + 'cat', long * 2 + 'dog', long * 2 + 'dog'])
        policy.encode([long + 'cow'])
    [told] = [str(o.message) for o in said if 'prompts' in str(o.message)]
    assert told.startswith(f'2 of 3 prompts are longer than the {limit} tokens that this model reads')
    assert torch.equal(cond.embeds[1], cond.embeds[2])


def test_memory_keeps_the_last_prompts(load, monkeypatch):
    "Where memory is full the oldest embeddings go; a batch larger than memory is still whole."
    policy = load('flux-dev')
    whole = policy.encode(PROMPTS * 3)
    limit = policy.prompts.embeddings.bytes - 1
    monkeypatch.setattr('egrpo.models.conditions.MEMORY_BYTES', limit)
    again = policy.encode(['one more', *PROMPTS])
    assert len(policy.prompts.embeddings.kept) < 3 and torch.equal(again.embeds[1:], whole.embeds[:2])
    assert limit >= policy.prompts.embeddings.bytes == sum(x.nbytes for c in policy.prompts.embeddings.kept.values() for x in c.parts)


@every
@pytest.mark.parametrize('how', ['offload', 'drop'])
def test_text_encoders_away(load, tmp_path, name, how):
    "Offloaded or dropped, they leave the images as they are; a dropped one cannot embed another prompt."
    images = ours(load(name, guidance=4.))
    policy = load(name, guidance=4., text_encoders=how, embeddings=tmp_path)
    if how == 'drop': policy.drop_text_encoders(PROMPTS)
    assert torch.equal(ours(policy), images)
    left = [n for n, part in policy.pipeline.components.items() if n.startswith('text_encoder') and part is not None]
    assert bool(left) == (how == 'offload')
    if how == 'drop':
        with pytest.raises(ValueError, match="prompt 'a star' was not embedded"): policy.encode(['a star'])


@pytest.mark.parametrize('left', [0, 20, -1], ids=['empty', 'no header', 'a byte short'])
def test_damaged_embeddings_are_made_again_before_text_encoders_go(load, tmp_path, left):
    images = ours(load('sd3', guidance=4., embeddings=tmp_path))
    for file in tmp_path.iterdir(): file.write_bytes(file.read_bytes()[:left]) # the empty prompt's as well
    policy = load('sd3', guidance=4., text_encoders='drop', embeddings=tmp_path)
    policy.drop_text_encoders(PROMPTS)
    assert torch.equal(ours(policy), images)


@pytest.mark.parametrize('name', ['flux-dev', 'sd3', 'sdxl'])
def test_whole_pipeline_is_saved_without_its_text_encoders_in_memory(load, tmp_path, name):
    policy = load(name, guidance=4., text_encoders='drop', embeddings=tmp_path/'kept')
    policy.drop_text_encoders(PROMPTS)
    moved(policy, .01).save(tmp_path/'whole')
    plain = DiffusionPipeline.from_pretrained(tmp_path/'whole', use_safetensors=True)
    assert_close(ours(policy), theirs(plain, policy), atol=2e-4, rtol=0)


def test_sd3_without_t5(folders):
    "Stable Diffusion 3 may be loaded without its largest text encoder."
    from egrpo.models.families import SD3Policy
    def without(): return DiffusionPipeline.from_pretrained(folders/'sd3', text_encoder_3=None, tokenizer_3=None)
    policy = SD3Policy(without(), device='cpu')
    assert_close(ours(policy), theirs(without(), policy), atol=2e-4, rtol=0)


# ---- memory and precision

@every
@pytest.mark.parametrize('lora_rank', [0, 2])
def test_gradient_checkpointing_changes_nothing(load, name, lora_rank):
    "The same gradients from fewer kept activations."
    def gradients(**kwargs):
        kept, policy = [], moved(load(name, lora_rank, guidance=3., **kwargs), .02)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            policy.velocity(noise_of(policy), torch.tensor([.9, .3]), policy.encode(PROMPTS)).square().sum().backward()
        return {n: p.grad for n, p in policy.parameters().items()}, sum(kept)
    (plain, many), (checked, few) = gradients(), gradients(gradient_checkpointing=True)
    assert few < .7 * many
    for n, g in plain.items(): assert_close(checked[n], g, rtol=1e-4, atol=float(1e-5 * g.abs().max()))


def test_compiled_blocks_round_as_uncompiled_ones(folders):
    "In bf16, passes with and without gradient agree to the last bit; attention is recorded uncompiled; no compiler, no run."
    def load(compiled, **kwargs): return moved(load_policy(str(folders/'sd3'), 'cpu', 'bf16', 2, compiled=compiled, **kwargs))
    missing = inductor.patch({'cpp.cxx': ('no-such-compiler',), 'force_disable_caches': True})
    with missing, pytest.raises(ValueError, match='compiled needs'): load(True)
    counters.clear()
    plain, compiled = load(None), load(True)
    x, sigma, cond = noise_of(plain), torch.tensor([.3, .8]), plain.encode(PROMPTS)
    with torch.no_grad(), record_attention_entropy(compiled.transformer) as seen: recorded = compiled.velocity(x, sigma, cond)
    assert seen.blocks and counters['stats']['unique_graphs'] == 1 # that of the compiler's trial
    with torch.no_grad(): sampled = compiled.velocity(x, sigma, cond)
    trained = compiled.velocity(x, sigma, cond)
    assert torch._dynamo.config.recompile_limit >= 64 and counters['stats']['unique_graphs'] > 2 and torch.equal(sampled, trained)
    assert_close(sampled, plain.velocity(x, sigma, cond).detach(), rtol=.02, atol=.02)
    assert torch.equal(recorded, plain.velocity(x, sigma, cond).detach())
    trained.square().sum().backward()
    plain.velocity(x, sigma, cond).square().sum().backward()
    found = compiled.parameters()
    for n, p in plain.parameters().items(): assert_close(found[n].grad, p.grad, rtol=.05, atol=.05 * float(p.grad.abs().max()))
    checked = load(True, gradient_checkpointing=True)
    again = checked.velocity(x, sigma, cond)
    again.square().sum().backward()
    assert torch.equal(again, trained)
    for n, p in checked.parameters().items(): assert_close(p.grad, found[n].grad, rtol=.05, atol=.05 * float(p.grad.abs().max()))
    with torch.no_grad(), checked.reference(), plain.reference():
        assert_close(checked.velocity(x, sigma, cond), plain.velocity(x, sigma, cond), rtol=.02, atol=.02)


def test_tiles_and_slices(load, folders):
    "Slices leave an image as it is; tiles are diffusers' own, and an image that fits one is not touched."
    policy, tiled = load('flux-dev', resolution=64), load('flux-dev', resolution=64, vae_tiling=True)
    latents = noise_of(policy, 3)
    whole = policy.decode(latents)
    policy.micro_batch = 1
    assert_close(policy.decode(latents), whole, atol=1e-5, rtol=0)
    assert (tiled.decode(latents) - whole).abs().max() > .05
    assert_close(tiled.decode(latents[..., :8, :8]), policy.decode(latents[..., :8, :8]), atol=1e-5, rtol=0)
    vae = load_pipeline(str(folders/'flux-dev')).vae
    vae.enable_tiling()
    with torch.no_grad(): theirs = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert_close(tiled.decode(latents), (theirs / 2 + .5).clamp(0, 1), atol=1e-5, rtol=0)


def test_dropout_of_a_lora_sleeps(folders, tmp_path):
    "Another trainer's LoRA may have dropout; samples and updates would see two policies."
    pipeline = load_pipeline(str(folders/'sd3'))
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=.5, target_modules=['to_q', 'to_k']))
    for n, p in pipeline.transformer.named_parameters(): p.data += .1 * ('lora_B' in n)
    state, config = get_peft_model_state_dict(pipeline.transformer), pipeline.transformer.peft_config['default']
    type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict())
    policy = load_policy(str(folders/'sd3'), 'cpu', lora_from=tmp_path)
    x, cond = noise_of(policy), policy.encode(PROMPTS)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == .5 for m in policy.transformer.modules())
    assert torch.equal(policy.velocity(x, torch.tensor([.3, .8]), cond), policy.velocity(x, torch.tensor([.3, .8]), cond))


@every
@pytest.mark.parametrize('lora_rank', [None, 0, 2])
def test_bf16_and_fp16(load, name, lora_rank):
    "A network in half precision: fp32 outside, what is trained fp32 inside, velocities near those of fp32."
    exact = load(name, None, guidance=3.)
    x, s = noise_of(exact), torch.tensor([.8, .3])
    with torch.no_grad(): v = exact.velocity(x, s, exact.encode(PROMPTS))
    for dtype, near in dict(bf16=.05, fp16=.01).items():
        policy = load_policy(exact.pipeline.name_or_path, 'cpu', dtype, lora_rank, guidance=3.)
        stored = {p.dtype for n, p in policy.transformer.named_parameters() if not p.requires_grad}
        assert stored <= {policy.dtype} and {p.dtype for p in policy.parameters().values()} <= {torch.float32}
        assert policy.pipeline.text_encoder.dtype == policy.dtype
        with torch.no_grad(): half = policy.velocity(x, s, policy.encode(PROMPTS))
        assert half.dtype == torch.float32 and (half - v).std() < near * v.std()
        images = policy.decode(x)
        assert images.dtype == torch.float32 and images.isfinite().all()


@pytest.mark.parametrize('name', ['flux-dev', 'sd3', 'sd1.5'])
def test_gradients_survive_fp16(load, name, monkeypatch):
    "Of a loss as small as a mean over a large image's latents, fp16 keeps the gradient; without scaling it is lost."
    def gradient(dtype):
        policy = moved(load_policy(load(name).pipeline.name_or_path, 'cpu', dtype, 2, guidance=3.))
        v = policy.velocity(noise_of(policy), torch.tensor([.6, .3]), policy.encode(PROMPTS))
        (v * v.detach().sign()).mean().mul(1e-6).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters().values()])
    exact, half = gradient('fp32'), gradient('fp16')
    assert torch.cosine_similarity(exact, half, 0) > .99 and abs(half.norm() / exact.norm() - 1) < .02
    monkeypatch.setattr('egrpo.models.precision._ScaledUp.backward', staticmethod(lambda ctx, grad: (grad, None)))
    lost = gradient('fp16')
    assert abs(lost.norm() / exact.norm() - 1) > .1


# ---- the model's own schedule

DYNAMIC = dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
SCHEDULERS = {'shift 3': dict(shift=3.), 'shift 1': dict(), 'dynamic': DYNAMIC, 'linear': DYNAMIC | dict(time_shift_type='linear'),
              'terminal': dict(shift=3., shift_terminal=.02), 'karras': dict(shift=3., use_karras_sigmas=True)}


@pytest.fixture(scope='module')
def pairs(folders):
    "A policy and the plain pipeline, of every flow family."
    names = 'flux-dev', 'flux-schnell', 'sd3'
    return {n: (load_policy(str(folders/n), 'cpu', lora_rank=None, guidance=2.), load_pipeline(str(folders/n))) for n in names}


def parity_oracle(policy, plain, steps, sigmas_of):
    "The ODE on a policy's schedule ends where a plain call of the pipeline does, which is told the number of steps and nothing else."
    x = noise_of(policy, 1)
    ode = Plan(sigmas_of(policy, steps), (Branch(),))
    with torch.no_grad(): found = walk(policy, x, ode.sigmas)
    flux, side = 'Flux' in type(plain).__name__, policy.resolution
    start = plain._pack_latents(x, *x.shape) if flux else x
    wanted = plain('a red circle', num_inference_steps=steps, height=side, width=side, latents=start, output_type='latent',
                   guidance_scale=policy.guidance, max_sequence_length=policy.text_length).images
    if flux: wanted = plain._unpack_latents(wanted, side, side, plain.vae_scale_factor)
    assert_close(found, wanted, atol=1e-5, rtol=0)
    assert_close(ode.sigmas, plain.scheduler.sigmas, atol=0, rtol=0)


def walk(policy, x, sigmas):
    "The ODE of one prompt."
    cond = policy.encode(['a red circle'])
    for s, s_next in zip(sigmas, sigmas[1:]): x = ode_step(policy.velocity(x, s[None], cond), x, s, s_next)
    return x


def own(policy, steps): return policy.sigmas(steps)


@pytest.mark.parametrize('scheduler', SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize('name', ['flux-dev', 'flux-schnell', 'sd3'])
def test_schedule_is_the_pipelines_own(pairs, name, scheduler):
    policy, plain = pairs[name]
    for side, steps in ((16, 2), (16, 4), (24, 10)):
        policy.resolution = side
        for p in (policy.pipeline, plain): p.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
        drawn = torch.random.get_rng_state()
        sigmas = policy.sigmas(steps)
        assert torch.equal(torch.random.get_rng_state(), drawn)
        assert sigmas[[0, -1]].tolist() == [1, 0] and sigmas.dtype == torch.float32
        parity_oracle(policy, plain, steps, own)


def test_parity_notices_another_schedule(pairs):
    policy, plain = pairs['sd3']
    policy.resolution = 16
    for p in (policy.pipeline, plain): p.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.)
    parity_oracle(policy, plain, 10, own)
    wrong = [lambda policy, n: flow_sigmas(n), # the lower end shifted once
             lambda policy, n: policy.sigmas(n + 1)[[*range(n), n + 1]], # one step too many, the last but one left out
             lambda policy, n: policy.sigmas(n - 1), lambda policy, n: policy.sigmas(n, 1.)]
    for sigmas_of in wrong:
        with pytest.raises(AssertionError): parity_oracle(policy, plain, 10, sigmas_of)


@every
def test_schedule_is_known_before_the_model_is_loaded(load, folders, name):
    policy = load(name, None)
    for steps in (1, 7): assert torch.equal(model_sigmas(str(folders/name), steps), policy.sigmas(steps))
    if name in UNETS: assert torch.equal(policy.sigmas(7), flow_sigmas(7))
    policy.pipeline.register_modules(**{k: None for k in policy.pipeline.components if k.startswith('text_encoder')}) # as once dropped
    assert torch.equal(model_sigmas(str(folders/name), 7), policy.sigmas(7))
    assert torch.equal(policy.sigmas(4, 2.), flow_sigmas(4, 2.)) and policy.sigmas(4, flow_sigmas(4, 2.)).equal(flow_sigmas(4, 2.))


@pytest.mark.parametrize('config, first', [(dict(invert_sigmas=True), .0), (dict(num_train_timesteps=1000), .9), (dict(), .9995)])
def test_a_schedule_that_does_not_start_from_noise(load, config, first):
    policy = load('sd3', None)
    policy.pipeline.scheduler = scheduler = FlowMatchEulerDiscreteScheduler(**config)
    if not config.get('invert_sigmas'): scheduler.sigma_max = first
    if first > .999: return assert_close(policy.sigmas(4)[0], torch.tensor(1.), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r'shift must be named: .* do not fall from 1 to 0 in 4 steps'): policy.sigmas(4)
    assert policy.sigmas(4, 3.).equal(flow_sigmas(4))


SHORT = dict(num_steps=10, active_steps=4, num_generations=2, prompts_per_iteration=1, iterations=2, eval_size=1, eval_every=0,
             device='cpu', guidance=1., lora_rank=2)


def test_a_run_is_on_its_models_schedule(folders, tmp_path, prompts_file, monkeypatch):
    "Plans, merge lengths, evaluations, a method of one's own; without a shift, and with one in its place."
    def one_step(iteration, num_steps, shift, num_generations=3):
        return Plan(flow_sigmas(num_steps, shift), (Branch((SDEStep(iteration, 1, num_generations),)),))

    config = TrainConfig(model=str(folders/'sd3'), prompts=prompts_file, out=str(tmp_path/'run'), **SHORT)
    trainer = Trainer(config, reward=darkness)
    levels = trainer.policy.sigmas(10)
    assert levels[-2] < .01 < flow_sigmas(10)[-2]
    [plan], _ = trainer.plan(0)
    assert torch.equal(plan.sigmas, levels)
    lengths = [s.length for b in plan.branches for s in b.steps]
    assert lengths == merge_lengths(levels, 2.2)[:4].tolist() != merge_lengths(flow_sigmas(10), 2.2)[:4].tolist()
    assert describe(plan) in describe_run(config)
    images = []
    trainer.eval_reward = get_reward(lambda x, prompts: images.append(x) or x.mean((1, 2, 3)))
    trainer.evaluate()
    assert_close(images[0], sample_images(trainer.policy, trainer.eval_prompts, 10), atol=0, rtol=0)
    assert (images[0] - sample_images(trainer.policy, trainer.eval_prompts, 10, 3.)).abs().max() > 1e-4
    for method in (one_step, 'one_step'):
        monkeypatch.setitem(METHODS, 'one_step', one_step)
        settings = replace(config, active_steps=None, method='one_step')
        mine = Trainer(settings, reward=darkness, policy=trainer.policy, method=method)
        [plan], _ = mine.plan(0)
        assert torch.equal(plan.sigmas, levels)
    named = Trainer(replace(config, shift=3.), reward=darkness, policy=trainer.policy)
    assert torch.equal(named.plan(0)[0][0].sigmas, flow_sigmas(10))


def test_a_run_goes_on_on_its_schedule(folders, tmp_path, prompts_file):
    "Noise levels are compared, not what names them; a checkpoint from before they were noted has its shift."
    def go_on(name, shift, iterations=2):
        config = TrainConfig(model=str(folders/name), prompts=prompts_file, out=str(tmp_path/name), shift=shift, resume=True, **SHORT)
        Trainer(replace(config, iterations=iterations, resume=iterations > 1), reward=darkness).fit()

    go_on('sd3', None, 1)
    with pytest.raises(ValueError, match='shift was None, is 3.0'): go_on('sd3', 3.)
    go_on('sd3', None)
    go_on('flux-dev', 3., 1)
    state = tmp_path/'flux-dev/checkpoint/state.json'
    info = json.loads(state.read_text())
    assert torch.tensor(info['model'].pop('sigmas')).equal(flow_sigmas(10))
    del info['digest'] # an older checkpoint has none
    state.write_text(json.dumps(info))
    with pytest.raises(ValueError, match='shift was 3.0, is 2.0'): go_on('flux-dev', 2.)
    go_on('flux-dev', None)


# ---- training

def darkness(images, prompts): return -images.mean((1, 2, 3))


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path/'prompts.txt'
    path.write_text('a red circle\ntwo blue squares\na green star\n')
    return str(path)


WAYS = {'LoRA': dict(lora_rank=2, lr=1e-3), 'whole': dict(), 'LoRA, every saver': dict(
    lora_rank=2, lr=1e-3, gradient_checkpointing=True, vae_tiling=True, text_encoders='drop', embeddings='kept', beta=.01)}


@every
@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_three_iterations(folders, tmp_path, prompts_file, name, way):
    "The loop runs on every family: ratio 1 at first, evaluations as predicted, weights that move, a result that plain diffusers loads."
    way = {**way, **({'embeddings': str(tmp_path/'kept')} if 'embeddings' in way else {})}
    small = dict(num_steps=6, active_steps=2, num_generations=3, prompts_per_iteration=2, iterations=3, eval_size=2, eval_every=0)
    config = TrainConfig(model=str(folders/name), prompts=prompts_file, device='cpu', guidance=3., out=str(tmp_path/'run'), ema_decay=0,
                         **small, **way)
    trainer = Trainer(config, reward=darkness)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.fit()
    metrics = [json.loads(line) for line in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert sum(m['nfe_rollout'] + m['nfe_gradient'] for m in metrics) == trainer.policy.nfe_per_velocity * training_nfe(config)
    assert max(m['ratio_error'] for m in metrics) < 1e-6, [m['ratio_error'] for m in metrics]
    assert any(not torch.equal(p, before[n]) for n, p in trainer.parameters.items())
    if config.lora_rank:
        plain = load_pipeline(str(folders/name))
        plain.load_lora_weights(str(tmp_path/'run/model'))
    else: plain = load_pipeline(str(tmp_path/'run/model'))
    prompts = trainer.eval_prompts
    assert_close(ours(trainer.policy, prompts), theirs(plain, trainer.policy, prompts), atol=5e-4, rtol=0)


@pytest.mark.parametrize('name', ['sd3', 'sd1.5', 'flux-dev'])
def test_attention_entropy_of_a_guided_policy(load, name):
    "A profile has a number per step and prompt, guided or not, and costs an evaluation for each."
    from egrpo.methods.aegpo import entropy_profiles
    from egrpo.paper.attention_signal import block_profiles
    guided, plain = (load(name, None, guidance=g) for g in (4., 1.))
    profiles = entropy_profiles(guided, PROMPTS, 5)
    assert profiles.shape == (2, 5) and guided.nfe == 10 and guided.guidance == 4.
    blocks, names = block_profiles(guided, PROMPTS, 5)
    assert blocks.shape == (2, 5, len(names))
    assert_close(blocks.mean(-1), profiles)
    if name != 'flux-dev': assert_close(profiles, entropy_profiles(plain, PROMPTS, 5))


SMALL_RUN = dict(num_steps=6, active_steps=2, num_generations=3, prompts_per_iteration=2, eval_size=2, eval_every=0, device='cpu', lr=1e-3)


def test_resume_from_a_lora_equals_straight(load, folders, tmp_path, prompts_file):
    "A run that began with a LoRA and lost its text encoders is stopped and resumed: the same bits, the same reference."
    moved(load('sd3', 3)).save(tmp_path/'lora')
    def run(out, **changes):
        config = TrainConfig(model=str(folders/'sd3'), lora_from=str(tmp_path/'lora'), prompts=prompts_file, text_encoders='drop',
                             embeddings=str(tmp_path/'kept'), beta=.1, out=str(tmp_path/out), **{**SMALL_RUN, **changes})
        trainer = Trainer(config, reward=darkness)
        trainer.fit()
        return trainer
    straight = run('straight', iterations=3)
    run('stopped', iterations=1)
    resumed = run('stopped', iterations=3, resume=True)
    for n, p in straight.parameters.items(): assert torch.equal(p, resumed.parameters[n]), n
    for n, p in straight.policy._reference.start.items(): assert torch.equal(p, resumed.policy._reference.start[n]), n


def test_two_processes_embed_their_share(folders, tmp_path, prompts_file):
    "Two processes share the prompts, drop their text encoders, and end where one does."
    for n in (1, 2):
        more = dict(model=folders/'sd3', lora_rank=2, prompts=prompts_file, text_encoders='drop', embeddings=tmp_path/f'kept{n}',
                    iterations=2, reward='test_policy:darkness', out=tmp_path/str(n))
        options = [f'--{k.replace("_", "-")}={v}' for k, v in {**SMALL_RUN, **more}.items()]
        launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', '-m', 'egrpo', 'train']
        done = subprocess.run([*launcher, *options], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stderr[-2000:]
    kept = [{f.name: f.read_bytes() for f in (tmp_path/f'kept{n}').iterdir()} for n in (1, 2)]
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 4 # three prompts and the empty one
    one, two = (load_file(tmp_path/str(n)/'checkpoint'/'weights.safetensors') for n in (1, 2))
    for n in one: assert_close(two[n], one[n], atol=2e-5, rtol=0)


def test_commands(folders, tmp_path, prompts_file, monkeypatch, capsys):
    "From the command line: train a LoRA on SD3, draw with it, score it; score what the run itself found."
    import pandas as pd

    from egrpo.cli.commands import main
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv('EGRPO_SCALE', raising=False) # a scale names the papers' shift
    model = ['--model', str(folders/'sd3'), '--device', 'cpu', '--guidance', '3']
    run = (f'--prompts {prompts_file} --reward test_policy:darkness --lora-rank 2 --lr 0.1 --iterations 2 --eval-size 3 --num-steps 6 '
           '--active-steps 2 --num-generations 3 --gradient-checkpointing --ema-decay 0 --prompts-per-iteration 1').split()
    assert main(['train', *model, *run, '--out', str(tmp_path/'run')]) == 0
    lora = ['--lora', str(tmp_path/'run/model'), '--prompts', prompts_file, '--num-steps', '6']
    assert main(['evaluate', *model, *lora, '--rewards', 'test_policy:darkness', '--out', str(tmp_path/'scores.csv')]) == 0
    scores, history, column = pd.read_csv(tmp_path/'scores.csv'), pd.read_csv(tmp_path/'run/evaluations.csv'), 'test_policy:darkness'
    before, after = (history[history.iteration == i][column].tolist() for i in (0, 2))
    assert scores[column].tolist() == pytest.approx(after, abs=1e-5) != pytest.approx(before, abs=1e-3)
    assert 'twice' in capsys.readouterr().out
    assert main(['sample', *model, *lora, '--vae-tiling', '--text-encoders', 'offload', '--out', str(tmp_path/'s.png')]) == 0
    assert (tmp_path/'s.png').stat().st_size > 1000


def test_aegpo_on_a_guided_model(folders, tmp_path, prompts_file):
    "Attention entropy picks steps and group sizes on Stable Diffusion 3 too."
    config = TrainConfig(model=str(folders/'sd3'), method='aegpo', prompts=prompts_file, iterations=2, out=str(tmp_path/'run'), guidance=3.,
                         **{**SMALL_RUN, 'num_generations': 4, 'active_steps': None})
    Trainer(config, reward=darkness).fit()
    metrics = [json.loads(line) for line in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert max(m['ratio_error'] for m in metrics) < 1e-6 and metrics[0]['nfe_probe'] == 2 * 2 * 6
