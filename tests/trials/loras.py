"LoRAs and models of other programs: every kind on every family, full width, damaged, from a silent hub, in one file."
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import diffusers
import torch
from row import Row
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_loras as kinds
from diffusers import FluxTransformer2DModel
from huggingface_hub import constants

from egrpo.models.lora_files import LORA_CONFIG, read_lora
from egrpo.models.pipeline import load_pipeline
from egrpo.models.policy import POLICIES, load_policy
from egrpo.testing.pipelines import SMALL, small_pipeline


def layers_of(model):
    "Linear layers and convolutions of a network's blocks."
    network = kinds.network_of(small_pipeline(model))
    fit = (torch.nn.Linear, torch.nn.Conv2d) if hasattr(network, 'down_blocks') else torch.nn.Linear
    return [n for n, m in network.named_modules() if isinstance(m, fit) and 'block' in n]


def apart(one, other):
    "The largest difference of two images."
    return float((one - other).abs().max())


def goes_on(source, model, pipeline=small_pipeline):
    "Largest difference of a LoRA that was read, trained and saved to plain diffusers."
    plain = pipeline(model)
    policy = POLICIES[type(plain)](pipeline(model), lora_from=source, device='cpu', guidance=3.)
    kinds.train(policy)
    with tempfile.TemporaryDirectory() as folder:
        policy.save(folder)
        plain.load_lora_weights(folder)
        return apart(kinds.images(policy), kinds.images(policy, plain))


NAMINGS = {'diffusers': kinds.dotted('transformer.'), 'peft': kinds.dotted('base_model.model.'),
           'ComfyUI': kinds.dotted('diffusion_model.'), 'kohya': kinds.underscored('lora_unet_'),
           'OneTrainer': kinds.underscored('lora_transformer_'), 'none': kinds.dotted('')}


def difference_of(model, name, alpha):
    "Largest difference of a LoRA on all layers to plain diffusers."
    layers = layers_of(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'adapter_model.safetensors'
        save_file(kinds.lora(model, NAMINGS[name], layers, alpha=alpha), path)
        settings = dict(r=2, rank_pattern={} if alpha else {layers[1]: 3}) # of peft
        path.with_name('adapter_config.json').write_text(json.dumps(settings))
        return goes_on(path, model)


def every_kind():
    "Each naming on all layers of each family, with and without alphas."
    cases = [(m, name, alpha) for m in SMALL for name in NAMINGS for alpha in (None, 3)]
    differences = [difference_of(*case) for case in cases]
    broken = sum(x > 1e-5 for x in differences)
    return Row('a naming on all layers of a family', len(cases), broken, f'{max(differences):.1e} of an image at most')


def wide_flux(model):
    "FLUX of full width: kohya's converter cuts the first layer of a single block at 3072."
    pipeline = small_pipeline('flux-dev')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True).eval()
    return pipeline


def full_width():
    "kohya's fused single block, of which each part takes a slice."
    sizes = {'lora_unet_single_blocks_0_linear1': (3 * 3072 + 12288, 3072),
             'lora_unet_double_blocks_0_img_attn_qkv': (3 * 3072, 3072)}
    tensors = kinds.fused({f'{n}.lora_{{}}.weight': size for n, size in sizes.items()})
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors | {f'{n}.alpha': torch.tensor(1.) for n in sizes}, f'{folder}/k.safetensors')
        difference = goes_on(f'{folder}/k.safetensors', '', wide_flux)
    return Row('kohya, FLUX of full width', 1, int(difference > 1e-5), f'{difference:.1e} of an image')


def flipped_bits(n=300):
    "A bit of a saved LoRA is flipped: it is refused, or is the LoRA still."
    unnoticed, passed, draw = 0, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'pytorch_lora_weights.safetensors'
        load_policy(device='cpu', lora_rank=1).save(folder)
        data, (tensors, metadata) = path.read_bytes(), read_lora(path, 'it')
        end = 8 + int.from_bytes(data[:8], 'little')
        for i in range(n):
            where = draw.randrange(end) if i % 2 else draw.randrange(end, len(data))
            path.write_bytes(data[:where] + bytes([data[where] ^ 1 << draw.randrange(8)]) + data[where + 1:])
            try: found, said = read_lora(path, 'it')
            except ValueError: continue
            passed += 1
            same = found.keys() == tensors.keys() and all(torch.equal(x, tensors[k]) for k, x in found.items())
            unnoticed += not same or said.get(LORA_CONFIG) != metadata[LORA_CONFIG]
    return Row('a flipped bit in a LoRA', n, unnoticed, f'{passed} read')


def equal_bytes(n=4):
    "Equal LoRAs of processes whose sets have another order."
    script = 'import sys; from egrpo.models.policy import load_policy as l; l(device="cpu", lora_rank=2).save(sys.argv[1])'
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            env = os.environ | dict(PYTHONHASHSEED=str(i))
            subprocess.run([sys.executable, '-c', script, f'{folder}/{i}'], env=env, check=True)
        files = {(Path(folder)/str(i)/'pytorch_lora_weights.safetensors').read_bytes() for i in range(n)}
    return Row('equal LoRAs of several processes', n, len(files) - 1, f'{len(files)} different')


def silent_hub():
    "A hub that cannot be reached: one line each, soon."
    began, broken = time.monotonic(), 0
    commands = ['sample --lora someone/lora', 'sample --model someone/model',
                'train --lora-from someone/lora/a.safetensors']
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=folder, HF_HUB_OFFLINE='0')
        for words in commands:
            command = [sys.executable, '-m', 'egrpo', *words.split(), '--out', f'{folder}/out']
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
            lines = [line for line in done.stderr.splitlines() if 'error: ' in line]
            broken += done.returncode != 2 or len(lines) != 1
    seconds = (time.monotonic() - began) / len(commands)
    return Row('a hub that does not answer', len(commands), broken, f'{seconds:.0f} s each')


UNET = {'conv_in': 'input_blocks.0.0', 'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
        'down_blocks.0.resnets.0': 'input_blocks.1.0', 'down_blocks.0.attentions.0': 'input_blocks.1.1',
        'down_blocks.0.downsamplers.0.conv': 'input_blocks.2.0.op', 'down_blocks.1.resnets.0': 'input_blocks.3.0',
        'mid_block.resnets.0': 'middle_block.0', 'mid_block.attentions.0': 'middle_block.1', 'mid_block.resnets.1': 'middle_block.2',
        'up_blocks.0.resnets.0': 'output_blocks.0.0', 'up_blocks.0.resnets.1': 'output_blocks.1.0',
        'up_blocks.0.upsamplers.0.conv': 'output_blocks.1.1.conv', 'up_blocks.1.resnets.0': 'output_blocks.2.0',
        'up_blocks.1.attentions.0': 'output_blocks.2.1', 'up_blocks.1.resnets.1': 'output_blocks.3.0',
        'up_blocks.1.attentions.1': 'output_blocks.3.1', 'conv_norm_out': 'out.0', 'conv_out': 'out.2'}
RESNET = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'time_emb_proj': 'emb_layers.1',
          'conv_shortcut': 'skip_connection'}
VAE = {'mid_block.resnets.0': 'mid.block_1', 'mid_block.resnets.1': 'mid.block_2', 'mid_block.attentions.0': 'mid.attn_1',
       'conv_norm_out': 'norm_out', 'conv_shortcut': 'nin_shortcut', 'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k', 'to_v': 'v',
       'to_out.0': 'proj_out'}


def first_names(pipeline):
    "A Stable Diffusion 1.5 under the names of its first code (CompVis/stable-diffusion)."
    tensors = {}
    for name, x in pipeline.unet.state_dict().items():
        old = next(o for o in UNET if name.startswith(o + '.'))
        rest = name[len(old):]
        if 'resnets' in old: rest = re.sub(r'^\.(\w+)', lambda m: '.' + RESNET[m[1]], rest)
        tensors[f'model.diffusion_model.{UNET[old]}{rest}'] = x
    for name, x in pipeline.vae.state_dict().items():
        name = re.sub(r'down_blocks\.(\d)\.resnets\.(\d)', r'down.\1.block.\2', name)
        name = re.sub(r'up_blocks\.(\d)\.resnets\.(\d)', lambda m: f'up.{1 - int(m[1])}.block.{m[2]}', name)
        name = re.sub(r'down_blocks\.(\d)\.downsamplers\.0', r'down.\1.downsample', name)
        name = re.sub(r'up_blocks\.(\d)\.upsamplers\.0', lambda m: f'up.{1 - int(m[1])}.upsample', name)
        for new, old in VAE.items(): name = re.sub(rf'(^|\.){re.escape(new)}(?=\.)', rf'\1{old}', name)
        if 'attn_1' in name and x.ndim == 2: x = x[:, :, None, None]
        tensors[f'first_stage_model.{name}'] = x
    text = {f"cond_stage_model.transformer.{n if n.startswith('text_model.') else 'text_model.' + n}": x
            for n, x in pipeline.text_encoder.state_dict().items()}
    return {n: x.contiguous() for n, x in (tensors | text).items()}


def single_file():
    "One file of Stable Diffusion 1.5, its configuration fetched before."
    pipeline = small_pipeline('sd1.5')
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)/'models--stable-diffusion-v1-5--stable-diffusion-v1-5'
        pipeline.save_pretrained(cache/'snapshots/0')
        for file in [*cache.rglob('*.safetensors')]: file.unlink()
        (cache/'refs').mkdir()
        (cache/'refs/main').write_text('0')
        save_file(first_names(pipeline), f'{folder}/sd.safetensors')
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = folder, True
        found = load_pipeline(f'{folder}/sd.safetensors')
    policy = kinds.policy_of('sd1.5')
    difference = apart(kinds.images(policy, found), kinds.images(policy))
    return Row('Stable Diffusion 1.5 in one file', 1, int(difference > 1e-5), f'{difference:.1e} of an image')


def trials(): # Yields rows
    "One row for each kind of fault."
    warnings.simplefilter('ignore')
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    for trial in (every_kind, full_width, flipped_bits, equal_bytes, silent_hub, single_file): yield trial()
