"""LoRAs as other programs write them: begun as in plain diffusers, trained, saved, and the same there again.

Names are those of diffusers' converters (diffusers/loaders/lora_conversion_utils.py, 0.42) and of public
files, named beside each kind."""
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_policy import theirs
from torch.testing import assert_close

from egrpo.cli.commands import main
from egrpo.models.lora import load_lora
from egrpo.models.lora_files import lora_file
from egrpo.models.pipeline import load_pipeline
from egrpo.models.policy import POLICIES, load_policy
from egrpo.testing.pipelines import small_pipeline

FLUX_LAYERS = ['transformer_blocks.0.attn.to_q', 'transformer_blocks.0.attn.add_k_proj',
               'transformer_blocks.0.ff.net.2', 'single_transformer_blocks.0.attn.to_v',
               'single_transformer_blocks.0.proj_out', 'proj_out']
SD3_LAYERS = ['transformer_blocks.0.attn.to_q', 'transformer_blocks.1.attn.to_out.0',
              'transformer_blocks.0.ff_context.net.0.proj']
UNET_BLOCKS = [f'{block}.attentions.0.transformer_blocks.0' for block in ('down_blocks.0', 'mid_block')]
UNET_LAYERS = [f'{b}.{layer}' for b in UNET_BLOCKS for layer in ('attn1.to_q', 'attn2.to_out.0', 'ff.net.0.proj')]
UNET_CONV = ['down_blocks.0.resnets.0.conv1', 'down_blocks.0.downsamplers.0.conv',
             'mid_block.resnets.0.time_emb_proj']
TEXT_PARTS = 'self_attn.q_proj', 'self_attn.out_proj', 'mlp.fc1'
TEXT_LAYERS = [f'text_model.encoder.layers.1.{part}' for part in TEXT_PARTS]
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
        if alpha: tensors[naming(name, 'alpha')] = torch.tensor(float(alpha))
    return tensors


def dotted(prefix, down='lora_A.weight', up='lora_B.weight'):
    "Names with dots."
    return lambda name, part: f"{prefix}{name}.{dict(down=down, up=up).get(part, part)}"


def underscored(prefix):
    "Names of kohya's scripts."
    naming = dotted('', 'lora_down.weight', 'lora_up.weight')
    return lambda name, part: prefix + naming(name.replace('.', '_'), part)


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


def kohya(model, names=None, alpha=1):
    "As kohya-ss/sd-scripts' networks/lora.py writes them, LyCORIS' LoCon for convolutions."
    return lora(model, underscored('lora_unet_'), names, alpha=alpha)


def kohya_flux():
    "As kohya-ss/sd-scripts' networks/lora_flux.py writes them."
    sizes = {'img_attn_qkv': (96, 32), 'txt_attn_qkv': (96, 32), 'img_attn_proj': (32, 32),
             'txt_mlp_0': (128, 32), 'img_mod_lin': (192, 32)}
    sizes = {f'lora_unet_double_blocks_0_{n}': size for n, size in sizes.items()}
    sizes['lora_unet_single_blocks_0_linear2'] = (32, 160)
    tensors = fused({f'{n}.lora_{{}}.weight': size for n, size in sizes.items()})
    return tensors | {f'{n}.alpha': torch.tensor(2.) for n in sizes}


def xlabs():
    "As XLabs-AI/x-flux writes them (XLabs-AI/flux-RealismLora)."
    sizes = {'qkv_lora1': (96, 32), 'proj_lora1': (32, 32), 'qkv_lora2': (96, 32), 'proj_lora2': (32, 32)}
    return fused({f'double_blocks.0.processor.{n}.{{}}.weight': size for n, size in sizes.items()})


def sgm():
    "Of SDXL as its first code names the blocks (kohya-ss/sd-scripts' networks/lora.py)."
    tensors = kohya('sdxl', [n for n in UNET_LAYERS if 'mid_block' in n])
    return {n.replace('mid_block_attentions_0', 'middle_block_1'): x for n, x in tensors.items()}


def with_norms(alpha=None):
    "A LoRA with whole weights of norms, as diffusers' `_load_norm_into_transformer` reads them."
    name = 'transformer.transformer_blocks.0.attn.norm_{}.weight'
    norms = {name.format('q'): 1 + draw(16), name.format('added_k'): 1 + draw(16, seed=1)}
    return lora('flux-dev', dotted('transformer.'), alpha=alpha) | norms


def own(model):
    "A LoRA in diffusers' names, without alphas."
    return lora(model, dotted('unet.' if model.startswith(('sd1', 'sdxl')) else 'transformer.'))


def before_peft():
    "A LoRA of attention alone, as diffusers wrote it."
    return lora('sd1.5', attention('unet.'), [n for n in UNET_LAYERS if 'attn1' in n or 'attn2' in n])


def dora(model, prefix):
    "A LoRA with magnitudes, as peft and diffusers name them (`use_dora` of diffusers' training scripts)."
    network, tensors = network_of(small_pipeline(model)), lora(model, dotted(prefix))
    sizes = {n: network.get_submodule(n).weight.flatten(1).norm(dim=1) for n in LAYERS[model]}
    return tensors | {f'{prefix}{n}.lora_magnitude_vector': 1.1 * x for n, x in sizes.items()}


SAME = { # kinds that plain diffusers loads, too: model, tensors
    'diffusers': [(m, partial(own, m)) for m in LAYERS],
    # TheLastBen/Jon_Snow_Flux_LoRA
    'alphas in diffusers names': [('flux-dev', lambda: lora('flux-dev', dotted('transformer.'), alpha=3))],
    'diffusers, before peft': [('sd1.5', before_peft)],
    'kohya': [('flux-dev', kohya_flux), ('sd1.5', lambda: kohya('sd1.5')), ('sdxl', sgm)],
    'kohya, convolutions': [('sd1.5', lambda: kohya('sd1.5', UNET_CONV + UNET_LAYERS))],
    'convolutions': [('sd1.5', lambda: lora('sd1.5', dotted('unet.'), UNET_CONV + UNET_LAYERS))],
    'XLabs': [('flux-dev', xlabs)],
    'norms': [('flux-dev', with_norms)], 'norms and alphas': [('flux-dev', lambda: with_norms(3))],
    'DoRA': [('sd3', lambda: dora('sd3', 'transformer.')), ('sd1.5', lambda: dora('sd1.5', 'unet.'))],
}
WITH_ADAPTER = 'lora_A.default.weight', 'lora_B.default.weight'
RENAMED = { # kinds of which plain diffusers loads what has another name: model, tensors, its tensors
    'ai-toolkit, ComfyUI': ('sd3', lambda: lora('sd3', dotted('diffusion_model.'))),
    'no prefix': ('flux-dev', lambda: lora('flux-dev', dotted(''))), # `transformer.save_lora_adapter`
    'OneTrainer': ('flux-dev', lambda: lora('flux-dev', underscored('lora_transformer_'))),
    'SimpleTuner': ('flux-dev', lambda: lora('flux-dev', dotted('diffusion_model.', *WITH_ADAPTER))),
}


# ---- what becomes of them

def policy_of(model, **settings):
    "A policy on a small pipeline."
    pipeline = small_pipeline(model)
    return POLICIES[type(pipeline)](pipeline, device='cpu', guidance=3., **settings)


def images(policy, pipeline=None):
    "Images of a plain call of a pipeline, the policy's own or another's."
    return theirs(pipeline or policy.pipeline, policy, steps=2)


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
    assert (trained - begun).abs().max() > 1e-4, 'training does nothing'
    with policy.reference(): assert_close(images(policy), begun, atol=1e-5, rtol=0)
    policy.save(folder)
    # as a checkpoint: safetensors refuses layers that share a matrix
    save_file({n: p.detach() for n, p in policy.parameters().items()}, folder/'checkpoint')
    plain = small_pipeline(model)
    plain.load_lora_weights(str(folder))
    saved, again = images(policy, plain), images(policy_of(model, lora_from=folder))
    figures = dict(start=begun - start, plain=saved - trained, again=again - trained)
    measured('largest difference of an image, LoRA read, saved and read again',
             **{n: x.abs().max() for n, x in figures.items()})
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
    start = images(policy_of(model), plain)
    check_goes_on(tmp_path/'lora.safetensors', model, start, tmp_path/'saved', measured)


@pytest.mark.parametrize('as_file', [False, True])
@pytest.mark.parametrize('model', ['flux-dev', 'sd3', 'sd1.5'])
def test_adapter_of_peft(tmp_path, measured, model, as_file):
    "As flow_grpo, Flow-Factory and TRL leave them: `save_pretrained` of a `PeftModel`, its scale beside it."
    pipeline = small_pipeline(model)
    name = 'unet' if hasattr(pipeline, 'unet') else 'transformer'
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={'to_q': 2}, alpha_pattern={'to_q': 5}, use_rslora=as_file,
                        target_modules=['to_q', 'to_out.0', 'net.2'], init_lora_weights=False)
    torch.manual_seed(0)
    network = get_peft_model(getattr(pipeline, name), config)
    network.save_pretrained(tmp_path/'peft')
    plain = PeftModel.from_pretrained(getattr(small_pipeline(model), name), tmp_path/'peft')
    setattr(pipeline, name, plain.base_model.model)
    source = tmp_path/'peft'/('adapter_model.safetensors' if as_file else '')
    check_goes_on(source, model, images(policy_of(model), pipeline), tmp_path/'saved', measured)


def test_alphas_of_layers(tmp_path):
    "diffusers passes over single alphas of a UNet's attention in kohya's names; here each layer has its own."
    tensors = kohya('sd1.5')
    name = 'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0'
    tensors[underscored('lora_unet_')(name, 'alpha')] = torch.tensor(5.)
    save_file(tensors, tmp_path/'lora.safetensors')
    policy, plain = policy_of('sd1.5', lora_from=tmp_path/'lora.safetensors'), small_pipeline('sd1.5')
    with torch.no_grad():
        for n in UNET_LAYERS:
            layer = plain.unet.get_submodule(n)
            down, up = pair(layer)
            layer.weight += (5 if n == name else 1) / 2 * up @ down
    assert_close(images(policy), images(policy, plain), atol=1e-5, rtol=0)


# ---- text encoders

def with_text(model):
    "A LoRA for network and text encoder: in diffusers' names, and in kohya's."
    if model == 'flux-dev': naming, text = dotted('transformer.'), dotted('text_encoder.')
    else: naming, text = underscored('lora_unet_'), underscored('lora_te_')
    tensors = lora(model, naming)
    for i, name in enumerate(TEXT_LAYERS):
        width = (32, 16) if 'fc1' in name else (16, 16)
        down, up = draw(2, width[1], seed=i), draw(width[0], 2, seed=i)
        tensors |= {text(name, 'down'): 2 * down, text(name, 'up'): 2 * up}
    return tensors


@pytest.mark.parametrize('model', ['flux-dev', 'sd1.5'])
def test_text_encoder_is_sampled_with(tmp_path, model):
    "Its part of a LoRA is used where nothing is trained, with embeddings of its own; training is refused."
    tensors = with_text(model)
    save_file(tensors, tmp_path/'lora.safetensors')
    network = {n: x for n, x in tensors.items() if not n.startswith(('text_encoder', 'lora_te_'))}
    save_file(network, tmp_path/'alone.safetensors')
    policy = policy_of(model, lora_rank=None, lora_from=tmp_path/'lora.safetensors')
    alone = policy_of(model, lora_rank=None, lora_from=tmp_path/'alone.safetensors')
    plain = small_pipeline(model)
    plain.load_lora_weights(str(tmp_path/'lora.safetensors'))
    assert_close(images(policy), images(policy, plain), atol=1e-5, rtol=0)
    assert (images(policy) - images(alone)).abs().max() > 1e-3
    theirs_too = POLICIES[type(plain)](plain, None, device='cpu')
    for mine, other in zip(policy.encode(['a red circle']).parts, theirs_too.encode(['a red circle']).parts):
        if mine is not None: assert_close(mine, other, atol=1e-5, rtol=0)
    assert policy.prompts.embeddings.model != alone.prompts.embeddings.model
    with pytest.raises(ValueError, match='also has weights for text_encoder: train one of the .* alone'):
        policy_of(model, lora_from=tmp_path/'lora.safetensors')


# ---- what is refused

def marked(model, marks, prefix='transformer.'):
    "Tensors of another kind of adapter on one layer."
    return {f'{prefix}{LAYERS[model][0]}.{mark}': draw(4, 4, seed=i) for i, mark in enumerate(marks)}


PROJ, QKV = 'lora_unet_double_blocks_0_img_attn_proj', 'lora_unet_joint_blocks_0_x_block_attn_qkv'
LAST, NO_FIT = 'lora_unet_final_layer_linear.lora_{}.weight', 'does not fit this model'


def more_inputs():
    "A LoRA that makes the network's first layer wider."
    name = dotted('transformer.')
    return {name('x_embedder', 'down'): draw(2, 32), name('x_embedder', 'up'): draw(32, 2)}


def half_a_layer():
    "A LoRA whose last layer has one matrix."
    tensors = lora('sd3', dotted('transformer.'))
    return {n: x for n, x in tensors.items() if 'ff_context' not in n or 'lora_A' in n}


HADA = [f'hada_w{i}_{o}' for i in '12' for o in 'ab']
NORM = 'transformer.transformer_blocks.0.attn.norm_q.weight'
REFUSED = { # model, tensors, what is said
    # KohakuBlueleaf/LyCORIS
    'LoKr': ('sd3', lambda: marked('sd3', ['lokr_w1', 'lokr_w2']), 'is a LoKr, which diffusers does not put'),
    'LoHa': ('sd1.5', lambda: marked('sd1.5', HADA, 'lora_unet_'), 'is a LoHa'),
    'DoRA of LyCORIS': ('flux-dev', lambda: kohya_flux() | {f'{PROJ}.dora_scale': torch.ones(32)}, 'a DoRA of Ly'),
    'differences': ('flux-dev', lambda: kohya_flux() | {f'{PROJ}.diff_b': torch.ones(32)}, 'differences of'),
    'Tucker': ('sd1.5', lambda: marked('sd1.5', ['lora_mid.weight'], 'lora_unet_'), 'third matrix'),
    # diffusers gives the last layer no name that its network has
    'last layer': ('flux-dev', lambda: kohya_flux() | fused({LAST: (16, 32)}), '20 of its 22 tensors'),
    # kohya-ss/sd-scripts' networks/lora_sd3.py
    'kohya of SD3': ('sd3', lambda: fused({f'{QKV}.lora_{{}}.weight': (96, 32)}), NO_FIT),
    # black-forest-labs/FLUX.1-Depth-dev-lora
    'more inputs': ('flux-dev', more_inputs, NO_FIT),
    'half a layer': ('sd3', half_a_layer, NO_FIT),
    'norms alone': ('sd3', lambda: {NORM: torch.ones(16)}, 'holds no LoRA, but tensors such as'),
    'not a LoRA': ('flux-dev', lambda: {'x': torch.ones(2)}, 'holds no LoRA, but tensors such as x'),
    'another model': ('sd1.5', lambda: own('sd3'), NO_FIT),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_lora_that_is_refused(tmp_path, kind):
    model, tensors, says = REFUSED[kind]
    save_file(tensors(), tmp_path/'lora.safetensors')
    source = tmp_path/'lora.safetensors'
    with pytest.raises(ValueError, match=says) as error: policy_of(model, lora_from=source)
    assert str(error.value).startswith('lora_from: ') and '\n' not in str(error.value)


SETTINGS = {'kind LOKR': dict(peft_type='LOKR'), NO_FIT: dict(r=3),
            "changed the model's own weights": dict(init_lora_weights='pissa'),
            'trained with use_qalora': dict(use_qalora=True), 'without its adapter_config.json': None,
            'settings .rank, alpha. are damaged': 'damaged'}


@pytest.mark.parametrize('says, changes', SETTINGS.items(), ids=list(SETTINGS))
def test_adapter_of_peft_that_is_refused(tmp_path, says, changes):
    network = get_peft_model(small_pipeline('sd3').transformer, LoraConfig(r=2, target_modules=['to_q']))
    network.save_pretrained(tmp_path)
    settings = tmp_path/'adapter_config.json'
    if changes == 'damaged': settings.write_bytes(b'\xff{')
    elif changes: settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    else: settings.unlink()
    with pytest.raises(ValueError, match=says): policy_of('sd3', lora_from=tmp_path)


def test_lora_that_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    "By its names and shapes, in a dry run as in a run: another network's, another rank. A recipe's rank gives way to that of the LoRA."
    monkeypatch.chdir(tmp_path)
    save_file(own('sd3'), 'sd3.safetensors')
    save_file(own('sd1.5'), 'unet.safetensors')
    save_file({'x': torch.ones(1)}, 'none.safetensors')
    model_folder('sd1.5', lambda folder: None, tmp_path/'sd1.5')
    rank = policy_of('sd3', lora_from='sd3.safetensors').lora_rank
    Path('mine.yaml').write_text(f'lora_rank: {rank + 5}\nlora_alpha: 3.0\neval_size: 2\n')
    monkeypatch.setattr('egrpo.models.policy.load_pipeline', lambda *args: pytest.fail('the model was loaded'))
    for command in ('train', 'train --dry-run', 'train mine.yaml --dry-run'):
        for words, says in (('unet.safetensors', 'is the LoRA of a UNet, and the model has a transformer'),
                            ('unet.safetensors --model black-forest-labs/FLUX.1-dev', 'is the LoRA of a UNet'),
                            ('sd3.safetensors --model sd1.5', 'is the LoRA of a transformer, and the model has a UNet'),
                            ('none.safetensors', 'holds no LoRA, but tensors such as x'),
                            (f'sd3.safetensors --lora-rank {rank + 2}', f'lora_rank is {rank + 2}, lora_from has rank {rank}')):
            assert main(f'{command} --lora-from {words}'.split()) == 2
            assert says in capsys.readouterr().err, words
    for words in (f'--lora-rank {rank}', '--model someone/unknown --reward hpsv2.1 --prompts hpd.txt'):
        Path('hpd.txt').write_text('a fox\n')
        assert main(f'train mine.yaml --dry-run --lora-from sd3.safetensors {words}'.split()) == 0
        assert 'LoRA from sd3.safetensors' in capsys.readouterr().out


def test_one_lora_of_a_folder(tmp_path):
    "Only one that is certain; others by their names."
    with pytest.raises(ValueError, match='has no .safetensors file'): lora_file(tmp_path)
    for name in ('b', 'a'): save_file({'x': torch.ones(1)}, tmp_path/f'{name}.safetensors')
    says = 'has 2 LoRAs: name one of its files, a.safetensors, b.safetensors'
    with pytest.raises(ValueError, match=says): lora_file(tmp_path)
    assert lora_file(tmp_path/'b.safetensors') == tmp_path/'b.safetensors'
    for name in ('adapter_model', 'pytorch_lora_weights'):
        save_file({'x': torch.ones(1)}, tmp_path/f'{name}.safetensors')
        assert lora_file(tmp_path).stem == name


def test_lora_of_the_hub(tmp_path, monkeypatch):
    "One that was fetched before is found without a network; another is one line."
    folder = tmp_path/'models--someone--a.lora'
    snapshot = folder/'snapshots/0123'
    policy_of('sd3', lora_rank=2).save(snapshot)
    os.rename(snapshot/'pytorch_lora_weights.safetensors', snapshot/'mine.safetensors')
    (folder/'refs').mkdir()
    (folder/'refs/main').write_text('0123')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for source in ('someone/a.lora', 'someone/a.lora/mine.safetensors'):
        assert lora_file(source).name == 'mine.safetensors'
    assert policy_of('sd3', lora_from='someone/a.lora').lora_rank == 2
    for source in ('someone/another', 'someone/a.lora/yours.safetensors', 'someone/another/x.safetensors'):
        with pytest.raises(ValueError, match=f"lora_from: '{source}' .*hub") as error: lora_file(source)
        assert '\n' not in str(error.value)


# ---- the file

def test_equal_loras_are_equal_files(tmp_path):
    "Whatever order sets and metadata have; one flipped bit is noticed."
    policy = policy_of('flux-dev', lora_rank=2)
    for i in range(9): policy.save(tmp_path/str(i))
    files = [tmp_path/str(i)/'pytorch_lora_weights.safetensors' for i in range(9)]
    assert len({f.read_bytes() for f in files}) == 1
    data = files[0].read_bytes()
    begins = 8 + int.from_bytes(data[:8], 'little')
    names = {f'transformer.{n}' for n in get_peft_model_state_dict(policy.transformer)}
    assert begins % 8 == 0 and load_file(files[0]).keys() == names
    for where in (begins, (begins + len(data)) // 2, len(data) - 1):
        files[0].write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1:])
        with pytest.raises(ValueError, match="lora_from: .* is damaged"): load_lora(policy.pipeline, files[0])
    files[0].write_bytes(data[:-8])
    with pytest.raises(ValueError, match='lora_from: .* cannot be read'): load_lora(policy.pipeline, files[0])


# ---- models

def change(part, **settings):
    "Write other settings into a part's configuration."
    def apply(folder):
        path = folder/part/'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return apply


def flow_scheduler(folder):
    "A UNet with the schedule of a flow."
    shutil.rmtree(folder/'scheduler')
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder/'scheduler')
    index = json.loads((folder/'model_index.json').read_text())
    index['scheduler'] = ['diffusers', 'FlowMatchEulerDiscreteScheduler']
    (folder/'model_index.json').write_text(json.dumps(index))


def pickled(folder):
    "Weights of a part as a pickle."
    file = folder/'unet/diffusion_pytorch_model.safetensors'
    file.rename(file.with_suffix('.bin'))


def only_fp16(folder):
    "Files of one precision."
    for file in [*folder.rglob('*.safetensors')]: file.rename(file.with_name(f'{file.stem}.fp16.safetensors'))


def without_t5(folder):
    "What those leave away who lack the memory."
    for name in ('text_encoder_3', 'tokenizer_3'): shutil.rmtree(folder/name)


def model_folder(model, spoil, folder):
    "A small pipeline's folder, changed."
    small_pipeline(model).save_pretrained(folder)
    spoil(folder)
    return folder


MISFITS = [
    ('flux-dev', change('transformer', num_layers=0), 'its transformer do not fit .*32 have no place'),
    ('flux-dev', change('transformer', num_single_layers=2), 'its transformer do not fit .* are missing'),
    ('sd1.5', change('vae', layers_per_block=2), 'weights of its vae do not fit'),
    ('sd3', change('text_encoder', num_hidden_layers=1), 'its text_encoder do not fit .* have no place'),
    ('sd3', change('text_encoder_3', num_layers=3), 'its text_encoder_3 do not fit .* are missing'),
    ('sd1.5', flow_scheduler, 'has a UNet and a FlowMatchEulerDiscreteScheduler: give it the one'),
    ('sd1.5', pickled, 'has pickles .unet/diffusion_pytorch_model.bin')]


@pytest.mark.parametrize('model, spoil, says', MISFITS, ids=[o[2][:40] for o in MISFITS])
def test_model_that_is_refused(tmp_path, capfd, model, spoil, says):
    "No images of weights that do not belong to the configuration, and no pickles; nothing else is said."
    model = model_folder(model, spoil, tmp_path/'model')
    capfd.readouterr()
    with pytest.raises(ValueError, match=says) as error: load_pipeline(str(model))
    assert str(error.value).startswith(f"model '{tmp_path}") and '\n' not in str(error.value)
    assert not [line for line in capfd.readouterr().err.splitlines() if line.strip() and '%|' not in line]


FILES = {'old.ckpt': 'is a pickle, .*from_single_file', 'net.gguf': 'a quantized network alone',
         'a.txt': 'is no model', 'lora.safetensors': 'is a LoRA', 'whole.safetensors': 'could not be loaded as a single file'}


@pytest.mark.parametrize('name', FILES)
def test_file_that_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    tensor = 'transformer.x.lora_A.weight' if 'lora' in name else 'x'
    if 'safetensors' in name: save_file({tensor: torch.ones(1)}, tmp_path/name)
    else: (tmp_path/name).touch()
    with pytest.raises(ValueError, match=FILES[name]) as error: load_pipeline(str(tmp_path/name))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('model', ['sd3', 'sdxl'])
def test_files_of_one_precision(tmp_path, model):
    "A folder with fp16 files alone is the same model, also where text encoders are read again to save it."
    folder = model_folder(model, only_fp16, tmp_path/'model')
    policy = load_policy(str(folder), 'cpu', text_encoders='drop', embeddings=tmp_path/'kept')
    policy.drop_text_encoders(['a red circle'])
    policy.save(tmp_path/'saved')
    plain, again = small_pipeline(model), load_pipeline(str(tmp_path/'saved'))
    for name, part in plain.components.items():
        if not isinstance(part, torch.nn.Module): continue
        assert_close(dict(getattr(again, name).state_dict()), dict(part.state_dict()), rtol=0, atol=0)


def published_names(folder):
    "As the published Stable Diffusion 1.5 has them: old names of the VAE's attention, and a list of positions."
    file = folder/'vae/diffusion_pytorch_model.safetensors'
    tensors = load_file(file)
    for new, old in {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}.items():
        tensors = {n.replace(f'.{new}.', f'.{old}.'): x for n, x in tensors.items()}
    save_file(tensors, file, metadata=dict(format='pt'))
    file = folder/'text_encoder/model.safetensors'
    positions = {'text_model.embeddings.position_ids': torch.arange(16)[None]}
    save_file(load_file(file) | positions, file, metadata=dict(format='pt'))


def test_names_of_published_weights(tmp_path):
    "Names that diffusers and transformers know to translate or to leave out are no mistake."
    found = load_pipeline(str(model_folder('sd1.5', published_names, tmp_path/'model')))
    assert_close(dict(found.vae.state_dict()), dict(small_pipeline('sd1.5').vae.state_dict()), rtol=0, atol=0)


def test_without_t5(tmp_path):
    "SD3 whose folder names a T5 that is not there, as plain diffusers loads it without."
    folder = model_folder('sd3', without_t5, tmp_path/'model')
    with pytest.warns(UserWarning, match='has no T5'): policy = load_policy(str(folder), 'cpu', guidance=3.)
    plain = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    assert_close(images(policy), images(policy, plain), atol=1e-5, rtol=0)
    assert (images(policy) - images(policy, small_pipeline('sd3'))).abs().max() > 1e-4
    policy.save(tmp_path/'saved')
    assert load_pipeline(str(tmp_path/'saved')).text_encoder_3 is None
