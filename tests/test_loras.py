"""LoRAs as other programs write them: the start is what plain diffusers makes of them, and what is saved after training is what was trained.

Names are those of diffusers' converters (diffusers/loaders/lora_conversion_utils.py, 0.42) and of public files, named beside each kind."""
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_policy import theirs
from torch.testing import assert_close

from egrpo.policy import DIGEST, POLICIES, load_pipeline, lora_file
from egrpo.small_pipelines import small_pipeline

FLUX_LAYERS = ['transformer_blocks.0.attn.to_q', 'transformer_blocks.0.attn.add_k_proj', 'transformer_blocks.0.ff.net.2',
               'single_transformer_blocks.0.attn.to_v', 'single_transformer_blocks.0.proj_out', 'proj_out']
SD3_LAYERS = ['transformer_blocks.0.attn.to_q', 'transformer_blocks.1.attn.to_out.0', 'transformer_blocks.0.ff_context.net.0.proj']
UNET_LAYERS = [f'{block}.attentions.0.{layer}' for block in ('down_blocks.0', 'mid_block') for layer in (
    'transformer_blocks.0.attn1.to_q', 'transformer_blocks.0.attn2.to_out.0', 'transformer_blocks.0.ff.net.0.proj')]
UNET_CONV = ['down_blocks.0.resnets.0.conv1', 'mid_block.resnets.0.time_emb_proj', 'down_blocks.0.downsamplers.0.conv']
TEXT_LAYERS = ['text_model.encoder.layers.0.self_attn.q_proj', 'text_model.encoder.layers.1.mlp.fc1']
LAYERS = {'flux-dev': FLUX_LAYERS, 'sd3': SD3_LAYERS, 'sd1.5': UNET_LAYERS, 'sdxl': UNET_LAYERS}


# ---- LoRAs

def network_of(pipeline):
    "The network that denoises."
    return pipeline.unet if hasattr(pipeline, 'unet') else pipeline.transformer


def draw(*shape, seed=0):
    "Noise of a size that changes images and keeps them images."
    return .2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(layer, rank=2):
    "The two matrices of a layer, of a convolution too."
    down, up = [rank, *layer.weight.shape[1:]], [layer.weight.shape[0], rank]
    return draw(*down), draw(*up, *[1] * (len(down) - 2), seed=1)


def lora(model, naming, names=None, rank=2, alpha=None):
    "A LoRA's tensors; `naming` makes a layer's name and a part, `down`, `up` or `alpha`, a tensor's name."
    network, tensors = network_of(small_pipeline(model)), {}
    for i, name in enumerate(names or LAYERS[model]):
        down, up = pair(network.get_submodule(name), rank + (alpha is None and i == 1))
        tensors |= {naming(name, 'down'): down, naming(name, 'up'): up}
        if alpha: tensors[naming(name, 'alpha')] = torch.tensor(float(alpha + (i == 1)))
    return tensors


def dotted(prefix, down='lora_A.weight', up='lora_B.weight'):
    "Names with dots."
    return lambda name, part: f"{prefix}{name}.{dict(down=down, up=up).get(part, part)}"


def underscored(prefix):
    "Names of kohya's scripts."
    return lambda name, part: f"{prefix}{name.replace('.', '_')}.{dict(down='lora_down.weight', up='lora_up.weight').get(part, part)}"


def attention(prefix):
    "Names of diffusers before peft: attention's layers are called by its processor."
    def naming(name, part):
        block, layer = name.rsplit('.attn', 1)
        return f"{prefix}{block}.attn{layer[0]}.processor.{layer[2:].removesuffix('.0')}_lora.{part}.weight"
    return naming


def fused(names):
    "FLUX's first names: queries, keys and values are one layer, with one alpha."
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors |= {name.format('down'): draw(4, columns), name.format('up'): draw(rows, 4, seed=1)}
    return tensors


def kohya_flux():
    "As kohya-ss/sd-scripts' networks/lora_flux.py writes them."
    block = 'lora_unet_double_blocks_0_'
    sizes = {f'{block}img_attn_qkv': (96, 32), f'{block}txt_attn_qkv': (96, 32), f'{block}img_attn_proj': (32, 32),
             f'{block}txt_mlp_0': (128, 32), f'{block}img_mod_lin': (192, 32), 'lora_unet_single_blocks_0_linear2': (32, 160)}
    tensors = fused({f'{n}.lora_{{}}.weight': size for n, size in sizes.items()})
    return tensors | {f'{n}.alpha': torch.tensor(2.) for n in sizes}


def xlabs():
    "As XLabs-AI/x-flux writes them (XLabs-AI/flux-RealismLora)."
    sizes = {'double_blocks.0.processor.qkv_lora1': (96, 32), 'double_blocks.0.processor.proj_lora1': (32, 32),
             'double_blocks.0.processor.qkv_lora2': (96, 32), 'double_blocks.0.processor.proj_lora2': (32, 32)}
    return fused({f'{n}.{{}}.weight': size for n, size in sizes.items()})


def sgm():
    "Of SDXL as its first code names the blocks (kohya-ss/sd-scripts' networks/lora.py)."
    naming = underscored('lora_unet_')
    tensors = lora('sdxl', naming, [n for n in UNET_LAYERS if 'mid_block' in n], alpha=1)
    return {n.replace('mid_block_attentions_0', 'middle_block_1'): x for n, x in tensors.items()}


def with_norms():
    "A LoRA with whole weights of norms, as diffusers' `_load_norm_into_transformer` reads them."
    norms = {f'transformer.transformer_blocks.0.attn.norm_{n}.weight': 1 + draw(16, seed=i) for i, n in enumerate(('q', 'added_k'))}
    return lora('flux-dev', dotted('transformer.')) | norms


def dora(model, prefix):
    "A LoRA with magnitudes, as peft and diffusers name them (`use_dora` of diffusers' training scripts)."
    network, tensors = network_of(small_pipeline(model)), lora(model, dotted(prefix))
    sizes = {n: network.get_submodule(n).weight.flatten(1).norm(dim=1) for n in LAYERS[model]}
    return tensors | {f'{prefix}{n}.lora_magnitude_vector': 1.1 * x for n, x in sizes.items()}


SAME = { # kinds that plain diffusers loads, too: model, tensors
    'diffusers': [(m, lambda m=m: lora(m, dotted('unet.' if m[:3] in ('sd1', 'sdx') else 'transformer.'))) for m in LAYERS],
    'alphas in diffusers names': [('flux-dev', lambda: lora('flux-dev', dotted('transformer.'), alpha=3))], # TheLastBen/Jon_Snow_Flux_LoRA
    'diffusers, before peft': [('sd1.5', lambda: lora('sd1.5', attention('unet.'), [n for n in UNET_LAYERS if 'attn' in n and '1.' in n]))],
    'kohya': [('flux-dev', kohya_flux), ('sd1.5', lambda: lora('sd1.5', underscored('lora_unet_'), alpha=1)), ('sdxl', sgm)],
    'kohya, convolutions': [('sd1.5', lambda: lora('sd1.5', underscored('lora_unet_'), UNET_CONV + UNET_LAYERS, alpha=1))],
    'convolutions': [('sd1.5', lambda: lora('sd1.5', dotted('unet.'), UNET_CONV + UNET_LAYERS))],
    'XLabs': [('flux-dev', xlabs)],
    'norms': [('flux-dev', with_norms)],
    'DoRA': [('sd3', lambda: dora('sd3', 'transformer.')), ('sd1.5', lambda: dora('sd1.5', 'unet.'))],
}
RENAMED = { # kinds of which plain diffusers loads what has another name: model, tensors, its tensors
    'ai-toolkit, ComfyUI': ('sd3', lambda: lora('sd3', dotted('diffusion_model.'))),
    'no prefix': ('flux-dev', lambda: lora('flux-dev', dotted(''))), # `transformer.save_lora_adapter` of diffusers
    'OneTrainer': ('flux-dev', lambda: lora('flux-dev', underscored('lora_transformer_'))),
    'SimpleTuner, ComfyUI': ('flux-dev', lambda: lora('flux-dev', dotted('diffusion_model.', 'lora_A.default.weight', 'lora_B.default.weight'))),
}


# ---- what becomes of them

def policy_of(model, **settings):
    "A policy on a small pipeline."
    pipeline = small_pipeline(model)
    return POLICIES[type(pipeline)](pipeline, device='cpu', guidance=3., **settings)


def images(policy, pipeline=None):
    "Images of a plain call of a pipeline, the policy's own or another's."
    return theirs(pipeline or policy.pipeline, policy, steps=5 if hasattr(policy, 'angles') else 2)


def train(policy, steps=2):
    "Change the LoRA as training does."
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(policy.parameters().values(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(1, *policy.latent_shape, generator=generator)
        policy.velocity(x, torch.tensor([.6]), policy.encode(['a red circle'])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_goes_on(source, model, start, folder, measured):
    "A LoRA begins as `start`, is trained, saved, and is the same in plain diffusers and in the next run."
    policy = policy_of(model, lora_from=source)
    begun = images(policy)
    assert_close(begun, start, atol=1e-5, rtol=0)
    assert (begun - images(policy, small_pipeline(model))).abs().max() > 1e-3, 'the LoRA does nothing'
    train(policy)
    trained = images(policy)
    assert (trained - begun).abs().max() > 1e-3, 'training does nothing'
    with policy.reference(): assert_close(images(policy), begun, atol=1e-5, rtol=0)
    policy.save(folder)
    plain = small_pipeline(model)
    plain.load_lora_weights(str(folder))
    saved, again = images(policy, plain), images(policy_of(model, lora_from=folder))
    measured('largest difference of an image, LoRA read, saved and read again',
             start=(begun - start).abs().max(), plain=(saved - trained).abs().max(), again=(again - trained).abs().max())
    assert_close(saved, trained, atol=1e-5, rtol=0)
    assert_close(again, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind, model, tensors', [(k, *case) for k, cases in SAME.items() for case in cases],
                         ids=lambda o: None if callable(o) else o)
def test_lora_that_diffusers_loads(tmp_path, measured, kind, model, tensors):
    save_file(tensors(), tmp_path/'lora.safetensors')
    plain = small_pipeline(model)
    plain.load_lora_weights(str(tmp_path/'lora.safetensors'))
    start = images(policy_of(model), plain)
    check_goes_on(tmp_path/'lora.safetensors', model, start, tmp_path/'saved', measured)


@pytest.mark.parametrize('kind', RENAMED)
def test_lora_of_other_names(tmp_path, measured, kind):
    "What diffusers would load under its own names."
    model, tensors = RENAMED[kind]
    save_file(tensors(), tmp_path/'lora.safetensors')
    plain = small_pipeline(model)
    plain.load_lora_weights(lora(model, dotted('transformer.')))
    check_goes_on(tmp_path/'lora.safetensors', model, images(policy_of(model), plain), tmp_path/'saved', measured)


@pytest.mark.parametrize('as_file', [False, True])
@pytest.mark.parametrize('model', ['flux-dev', 'sd3', 'sd1.5'])
def test_adapter_of_peft(tmp_path, measured, model, as_file):
    "As flow_grpo, Flow-Factory and TRL leave them: `save_pretrained` of a `PeftModel`, its scale in adapter_config.json."
    pipeline = small_pipeline(model)
    name = 'unet' if hasattr(pipeline, 'unet') else 'transformer'
    config = LoraConfig(r=4, lora_alpha=6, target_modules=['to_q', 'to_out.0', 'net.2'], init_lora_weights=False, use_rslora=as_file,
                        rank_pattern={'to_q': 2}, alpha_pattern={'to_q': 5})
    torch.manual_seed(0)
    network = get_peft_model(getattr(pipeline, name), config)
    network.save_pretrained(tmp_path/'peft')
    setattr(pipeline, name, PeftModel.from_pretrained(getattr(small_pipeline(model), name), tmp_path/'peft').base_model.model)
    source = tmp_path/'peft'/('adapter_model.safetensors' if as_file else '')
    check_goes_on(source, model, images(policy_of(model), pipeline), tmp_path/'saved', measured)
