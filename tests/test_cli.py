"The command line: help that suffices, options that are the configuration, tables that say what the scores say, a repeatable demo."
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from egrpo.cli import demo, entry, options, paper, planning, sampling, shared, tables, training
from egrpo.cli.commands import COMMANDS, main
from egrpo.core.entropy import merge_lengths
from egrpo.core.sigmas import flow_sigmas
from egrpo.methods.registry import METHODS, find_method, method_settings, published
from egrpo.models.pipeline import assets_path, load_pipeline
from egrpo.models.policy import model_sigmas
from egrpo.paper.claims import CLAIMS
from egrpo.paper.experiments import EXPERIMENTS, find_experiment
from egrpo.paper.records import SCALES, load_record
from egrpo.show import plots
from egrpo.show.samples import to_image
from egrpo.testing.pipelines import small_pipeline
from egrpo.train.config import SETTINGS, TrainConfig, check_config
from egrpo.train.evaluate import sample_images
from egrpo.train.prepare import check_method, prepare
from egrpo.train.trainer import Trainer

command = Path(sys.executable).parent/'egrpo'
small = shlex.split('--num-steps 6 --active-steps 2 --num-generations 4 --prompts-per-iteration 2 --eval-size 8 --device cpu')


def run(words, cwd, **kwargs):
    "The installed command, in a process of its own."
    return subprocess.run([command, *shlex.split(words)], capture_output=True, text=True, cwd=cwd, timeout=120, **kwargs)


def values(path): return pd.read_csv(path).select_dtypes('number')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with a run of two iterations, and one of a LoRA."
    folder = tmp_path_factory.mktemp('cli')
    assert main(['train', *small, '--iterations', '2', '--lr', '1e-3', '--out', str(folder/'full')]) == 0
    assert main(['train', *small, '--iterations', '1', '--lr', '1e-2', '--lora-rank', '2', '--out', str(folder/'lora')]) == 0
    return folder


# ---- help

def test_help_is_fast_and_imports_nothing_heavy():
    code = '''
import sys
from contextlib import suppress
from egrpo.cli.commands import main
for words in ([], ['--help'], ['train', '--help'], ['--version']):
    with suppress(SystemExit): main(words)
heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'diffusers', 'transformers', 'accelerate'} & {m.split('.')[0] for m in sys.modules}
assert not heavy, heavy
'''
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize('name', COMMANDS)
def test_help_suffices(name, capsys):
    with pytest.raises(SystemExit) as exited: main([name, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert exited.value.code == 0
    assert COMMANDS[name].text in text and f'example: {COMMANDS[name].example}' in text


@pytest.mark.parametrize('name', COMMANDS)
def test_example_parses(name):
    assert entry.make_parser().parse_args(shlex.split(COMMANDS[name].example)[1:]).command == name


def actions(name):
    "The options of a command."
    parser = entry.make_parser()
    return next(a for a in parser._actions if a.dest == 'command').choices[name]._actions[1:]


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_has_help_and_default(name):
    for action in actions(name):
        assert action.help, action.dest
        none = 'lora', 'prompts', 'picture', 'out', 'name', 'recipe', 'folder', 'run'
        known = '(default: ' in action.help or action.nargs == 0 or action.dest in none
        assert known, f'{name} --{action.dest}: {action.help}'


def test_no_option_was_lost():
    "Commands and options as they were before the room was split."
    before = {tuple(line.split()) for line in (Path(__file__).parent/'options.txt').read_text().splitlines()}
    now = set()
    for name in COMMANDS:
        for a in actions(name): now.add((name, *(a.option_strings[:1] or [a.dest]), *filter(None, [a.metavar])))
    assert not before - now


def test_scales_named_in_the_help_are_those_there_are(capsys):
    with suppress(SystemExit): main(['train', '--help'])
    out = capsys.readouterr().out
    assert all(name in out for name in SCALES)


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert 'egrpo COMMAND' in capsys.readouterr().out


# ---- options are the configuration

def other(field):
    "A value that is not the field's default, and the words for it."
    default = field.default
    if field.type is bool: return True, []
    if 'bool' in str(field.type): return False, ['no']
    if 'int | str' in str(field.type): return '768x1344', ['768x1344']
    if 'dict' in str(field.type): return dict(num_frames=5), ['num_frames=5']
    if 'str' in str(field.type): return 'other', ['other']
    value = default + .25 if field.type is float else (default or 0) + 3
    return value, [str(value)]


@pytest.mark.parametrize('field', SETTINGS.values(), ids=SETTINGS)
def test_every_field_is_an_option(field):
    value, words = other(field)
    assert field.default is not MISSING and value != field.default
    args = entry.make_parser().parse_args(['train', '--' + field.name.replace('_', '-'), *words])
    assert shared.given(args, options.config_options()) == {field.name: value}
    assert TrainConfig(**shared.given(args, options.config_options())).flat() == {**TrainConfig().flat(), field.name: value}


def test_none_is_a_value():
    for name, option in options.config_options().items():
        if not option.kind.endswith('|None'): continue
        args = entry.make_parser().parse_args(['train', '--' + name.replace('_', '-'), 'none'])
        assert shared.given(args, [name]) == {name: None}


def dry(words, monkeypatch):
    "The configuration that `egrpo train` arrives at."
    seen = []
    monkeypatch.setattr(training, 'check_run', lambda config: seen.append(config) or prepare(config))
    assert main(['train', *shlex.split(words), '--dry-run']) == 0
    return seen[0]


def test_a_scale_is_a_preset_that_options_override(here, monkeypatch):
    assert dry('', monkeypatch) == TrainConfig()
    assert dry('--scale smoke', monkeypatch) == TrainConfig(**SCALES['smoke'].settings)
    assert dry('--scale smoke --iterations 7', monkeypatch) == TrainConfig(**{**SCALES['smoke'].settings, 'iterations': 7})
    monkeypatch.setenv('EGRPO_SCALE', 'mini')
    assert dry('--tau 0', monkeypatch) == TrainConfig(**{**SCALES['mini'].settings, 'tau': 0.})


def test_dry_run_writes_nothing(here, capsys):
    assert main(['train', '--dry-run', '--iterations', '5']) == 0
    assert '5 iterations' in capsys.readouterr().out
    assert not list(here.iterdir())


def test_a_dry_run_says_what_a_method_was_published_with(here, capsys):
    assert main(shlex.split('train --dry-run --method flow_grpo --beta 0 --scale smoke')) == 0
    assert 'published  advantage_std batch, clip_range 0.0001, beta 0.04 (here 0), kl_weights delta\n' in capsys.readouterr().out
    (here/'own.py').write_text('from egrpo.methods.baselines import dance_grpo\ndef mine(num_steps=4): return dance_grpo(num_steps)\n')
    assert main(shlex.split('train --dry-run --method own.py:mine --scale smoke')) == 0
    assert 'published' not in capsys.readouterr().out


def test_a_dry_run_says_what_an_evaluation_measures(here, capsys):
    "And warns where that is the trained reward alone, as on prompts of one's own."
    (here/'own.txt').write_text('a red circle\n')
    trained = ', which is trained on: name another reward in --eval-rewards, too'
    for words, says in (('', 'verifier + verifier_strict'), ('--reward preference', 'verifier + verifier_strict'),
                        ('--prompts own.txt --reward preference', f'preference{trained}'),
                        ('--prompts own.txt --reward preference --eval-rewards preference+clip', 'preference + clip')):
        assert main(shlex.split(f'train --dry-run --scale smoke {words}')) == 0
        assert f'evaluated  by {says}\n' in capsys.readouterr().out


def test_evaluations_that_guidance_doubles_are_said_to_be(here, capsys):
    "Before a model is loaded, in a dry run and in a plan, which count network evaluations by one word."
    own = '--prompts p.txt --reward hpsv2.1'
    (here/'p.txt').write_text('a fox\n')
    twice, perhaps = 'twice the evaluations above', 'times two where guidance takes two evaluations'
    sd3 = 'stabilityai/stable-diffusion-3.5-medium'
    for model, guidance, says in ((sd3, '4.5', f'4.5: {twice}'), (sd3, '1', ''), ('Tongyi-MAI/Z-Image-Turbo', '0', ''),
                                  ('black-forest-labs/FLUX.1-dev', '3.5', ''),
                                  ('someone/unknown', '4', f'4: {perhaps}'), ('miniature', '3.5', '')):
        for command in (f'train --dry-run {own}', 'plan --processes 2 --shift 3'):
            assert main(shlex.split(f'{command} --scale smoke --model {model} --guidance {guidance}')) == 0
            out = capsys.readouterr().out
            assert says in out and ('guidance' in out) == bool(says) and 'network evaluations' in out and 'velocities' not in out, out
            assert ('--budget' in out) == bool(says)


def test_commands_that_take_a_recipe(here, monkeypatch, capsys):
    "tune and signal as train, plan and speed; options override it."
    (here/'mine.yaml').write_text('lora_rank: 3\nresolution: 32\nnum_steps: 5\nplan: {active_steps: 2}\n')
    seen = []
    def stop(config):
        seen.append(config)
        raise ValueError('enough')
    monkeypatch.setattr(training, 'check_run', stop)
    monkeypatch.setattr('egrpo.train.cost.policy_of', stop)
    for words in ('signal', 'tune', 'speed', 'train'): assert main([words, 'mine.yaml', '--resolution', '48']) == 2
    assert 'enough' in capsys.readouterr().err
    assert {(c.lora_rank, c.resolution, c.num_steps, c.plan['active_steps']) for c in seen} == {(3, 48, 5, 2)} and len(seen) == 4


def test_resume_needs_only_the_folder(folder, monkeypatch):
    "What is not given is as it was, whatever the environment's scale; what is given stands. A folder that was moved is where it is."
    monkeypatch.setenv('EGRPO_SCALE', 'mini')
    began = json.loads((folder/'lora/config.json').read_text()) | dict(resume=True)
    assert began['lora_rank'] == 2 and began['num_steps'] == 6
    assert dry(f'--resume --out {folder}/lora', monkeypatch).flat() == began
    assert dry(f'--resume --out {folder}/lora --iterations 9 --tau 1', monkeypatch).flat() == began | dict(iterations=9, tau=1.)
    shutil.copytree(folder/'lora', folder/'moved')
    assert dry(f'--resume --out {folder}/moved', monkeypatch).out == str(folder/'moved')


def test_what_goes_on_otherwise_is_said_or_refused_before_a_model_is_loaded(folder, capsys):
    words = f'train --resume --dry-run --out {folder}/lora'
    assert main(shlex.split(f'{words} --iterations 9 --lr .5')) == 0
    assert re.search(r'resumed  .*config.json; iterations was \d, is 9; lr was [\d.e-]+, is 0.5\n', capsys.readouterr().out)
    assert main(shlex.split(f'{words} --tau 1.1')) == 2
    out, err = capsys.readouterr()
    assert not out and 'resume: the checkpoint is of another configuration (tau was' in err
    (folder/'p.txt').write_text('a red circle\n')
    assert main(shlex.split(f'{words} --prompts {folder}/p.txt')) == 2
    assert 'prompts was' in capsys.readouterr().err


def test_folders_that_are_taken_for_each_other(folder, capsys):
    "A run's folder, its LoRA and a whole model, each where another is asked for."
    lora, run = f'{folder}/lora/model', f'{folder}/lora'
    whole = str(assets_path('miniature'))
    for words, says in ((f'train --dry-run --model {lora}', f"model '{lora}' is a LoRA: name the model that it is for"),
                        (f'sample --model {lora}', 'is a LoRA: name the model that it is for, and the LoRA by --lora'),
                        (f'sample --model {run}', f"model '{run}' is a run's folder: name '{lora}'"),
                        (f'sample --lora {run}', f"lora: '{run}' is a run's folder: name '{lora}'"),
                        (f'sample --lora {whole}', f"lora: '{whole}' is a whole model: name it as model"),
                        (f'train --dry-run --lora-from {whole}', 'is a whole model'),
                        (f'export {folder}/none', "none' is not there")):
        assert main(shlex.split(words)) == 2, words
        assert says in capsys.readouterr().err


@pytest.mark.parametrize('words, meant', [
    ('trian', 'train'), ('train flux_lora80gb', 'flux_lora_80gb'), ('plan --method mixgrpo', 'mix_grpo'), ('reproduce metods', 'methods'),
    ('train --tua 3', '--tau'), ('train --dry-run --kernel flw', 'flow')])
def test_what_was_meant(words, meant, capsys):
    assert main(shlex.split(words)) == 2
    assert f', did you mean {meant}?' in capsys.readouterr().err


def test_a_notebook_s_name_leads_to_its_experiments(capsys):
    assert main(['reproduce', 'table1']) == 2
    assert "experiment 'table1' is the notebook's name: take lr or " in (said := capsys.readouterr().err) and 'methods_clip' in said
    assert find_experiment('aegpo') is EXPERIMENTS['aegpo'] # also the beginning of a notebook's name


def test_memory_says_what_may_still_help(capsys):
    assert main(shlex.split('plan flux_lora_80gb --device-memory 24')) == 0
    said = capsys.readouterr().out
    assert 'try --quantize int8, --micro-batch 1, ' in said and '--gradient-checkpointing' not in said
    assert main(shlex.split('plan flux_egrpo')) == 0
    shared = re.search(r'each holds ([\d.]+): --processes 8 --share', capsys.readouterr().out)[1]
    assert main(shlex.split('plan flux_egrpo --processes 8 --share')) == 0
    assert re.search(rf'^all +{shared}$', capsys.readouterr().out, re.M)


def test_resume_with_a_damaged_config(folder, capsys):
    shutil.copytree(folder/'lora', folder/'damaged')
    (folder/'damaged/config.json').write_text('{"tau"')
    assert main(['train', '--resume', '--out', str(folder/'damaged')]) == 2
    assert "damaged/config.json' cannot be read" in capsys.readouterr().err


# ---- tables

def test_evaluation_on_training_prompts_says_so(here, capsys):
    (here/'p.txt').write_text('a red circle\na red circle\na blue circle\n')
    assert main(shlex.split('train --dry-run --prompts p.txt --prompts-per-iteration 3')) == 0
    assert '3 to train on, 2 distinct · 3 to evaluate on (training prompts)\n' in capsys.readouterr().out
    assert main(shlex.split('train --dry-run --prompts p.txt')) == 0
    assert '3 to train on, 2 distinct, fewer than the 4 of an iteration: some count twice · 3' in capsys.readouterr().out
    assert main(shlex.split('train --dry-run')) == 0
    assert 'training prompts' not in capsys.readouterr().out
    history = pd.DataFrame([dict(iteration=i, prompt=p, score=0.) for i in (0, 1) for p in ('a red circle', 'a cat')])
    heads = [tables.change_tables(history, trained).splitlines()[0] for trained in ((), ['a cat'], ['a cat', 'a red circle'])]
    assert [h.partition('noise')[2].partition(';')[0] for h in heads] == ['', ' (1 of them training prompts)', ' (training prompts)']


def test_change_table_says_what_the_scores_say(folder):
    frame = pd.read_csv(folder/'full/evaluations.csv')
    before, after = tables.ends(frame)
    assert (before.iteration.max(), after.iteration.min()) == (0, 2)
    rows = [line.split() for line in tables.change_table(before, after, 'verifier').splitlines()[2:]]
    assert [r[0] for r in rows][-1] == 'all' and sum(int(r[1]) for r in rows[:-1]) == int(rows[-1][1]) == len(before)
    wanted = [before.verifier.mean(), after.verifier.mean(), (after.verifier - before.verifier).mean()]
    np.testing.assert_allclose([float(x) for x in rows[-1][2:5]], wanted, atol=6e-4)
    low, high = (float(x.strip('[],')) for x in rows[-1][5:7])
    assert low <= wanted[2] + 1e-3 and wanted[2] - 1e-3 <= high


def test_change_is_paired():
    "Prompts far apart whose scores all rise alike: the interval of the change is a point, that of the scores is wide."
    before = pd.DataFrame(dict(prompt=[f'a {c} circle' for c in ('red', 'blue', 'green', 'black')], score=[0., .3, .6, .9]))
    after = before.assign(score=before.score + .1)
    assert '+0.100 [+0.100, +0.100]' in tables.change_table(before, after, 'score').splitlines()[-1]
    assert '[0.450, 0.450]' not in tables.category_table(before)


def test_prompts_of_another_world_have_no_categories():
    assert list(tables.category_rows(['a corgi', 'a red circle'])) == ['all']


# ---- the commands

def test_plan(here, capsys):
    assert main(shlex.split('plan --tau 1.8 --picture deep/plan.png')) == 0
    lines = capsys.readouterr().out.splitlines()
    merge = [line.split()[4] for line in lines[2:18]]
    assert merge[:8] == '1 1 1 2 2 2 2 3'.split() and merge[15] == '='
    assert float(lines[2].split()[3]) == pytest.approx(2.893) and float(lines[3].split()[3]) == pytest.approx(2.989)
    assert sum('●' in line for line in lines[2:18]) == 8
    assert lines[18] == '● explores and is trained · ✗ too few steps follow · = never explores'
    assert (here/'deep/plan.png').stat().st_size > 10_000


def test_plan_asks_the_model(tmp_path, capsys, monkeypatch):
    "Noise levels and merge lengths of Stable Diffusion 3.5's own schedule, from its files; a shift overrides them."
    small_pipeline('sd3').save_pretrained(tmp_path)
    for part in ('transformer', 'vae'): (tmp_path/part/'diffusion_pytorch_model.safetensors').unlink() # the weights are not needed
    levels = model_sigmas(str(tmp_path), 10)
    for shift, sigmas in (('', levels), (' --shift 3', flow_sigmas(10))):
        words = f'plan --model {tmp_path} --resolution 16 --num-steps 10 --active-steps 4{shift}'
        assert main(shlex.split(words)) == 0
        out = capsys.readouterr().out
        rows = [line.split() for line in out.splitlines()[2:12]]
        assert [row[1] for row in rows] == [f'{s:.4f}' for s in sigmas[:-1]]
        assert [int(row[4]) for row in rows[:4]] == merge_lengths(sigmas, 2.2)[:4].tolist()
        assert ("schedule: the model's own" in out) == (shift == '')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'planned with shift 3: no/such has no configuration files here' in planning.schedule_text(TrainConfig(model='no/such'))


def test_a_run_says_how_to_sample_on_its_schedule(tmp_path):
    small_pipeline('sd3').save_pretrained(tmp_path)
    def words(**fields): return training.sample_command(TrainConfig(**fields))
    assert all('--shift' not in words(shift=s) for s in (None, 3.)) and '--shift 2.0' in words(shift=2.)
    assert '--shift 3.0' in words(shift=3., model=str(tmp_path)) and '--shift' not in words(model=str(tmp_path))
    assert '--shift 3.0' in words(shift=3., model='no/such')


def test_plan_marks_what_cannot_reach_tau(capsys):
    assert main(shlex.split('plan --tau 2.6 --active-steps 12')) == 2
    out, err = capsys.readouterr()
    unreachable = [line.split()[0] for line in out.splitlines()[2:18] if line.split()[4] == '✗']
    assert unreachable == ['11', '12', '13', '14'] and 'tau 2.6 cannot be reached from step 11 of 16' in err


def test_evaluate_gives_the_scores_of_the_training_run(folder):
    scores = folder/'again.csv'
    assert main(shlex.split(f'evaluate --model {folder}/full/model --size 8 --num-steps 6 --device cpu --out {scores}')) == 0
    trained = tables.ends(pd.read_csv(folder/'full/evaluations.csv'))[1]
    np.testing.assert_allclose(values(scores), trained[['verifier', 'verifier_strict']], atol=1e-4)


def test_evaluate_checks_prompts_before_it_loads(here, monkeypatch, capsys):
    monkeypatch.setattr(sampling, 'load_sampler', lambda *args: pytest.fail('a model is loaded'))
    (here/'p.txt').write_text('a cat\n')
    assert main(shlex.split('evaluate --prompts p.txt')) == 2
    assert "reward 'verifier' is the miniature's" in capsys.readouterr().err


def test_the_command_that_samples_again():
    "All that differs and that sample takes; a whole number that equals a yes stays one."
    config = TrainConfig(model='flux', lora_rank=4, num_steps=4, micro_batch=1, vae_tiling=False, guidance=1., prompts='my p.txt', seed=3,
                         tau=0, out='runs/k')
    words = "--model flux --lora runs/k/model --guidance 1.0 --num-steps 4 --micro-batch 1 --vae-tiling no --prompts 'my p.txt'"
    assert training.sample_command(config) == f'egrpo sample {words}'
    args = entry.make_parser().parse_args(shlex.split(words := training.sample_command(config))[1:])
    assert all(getattr(args, k, getattr(TrainConfig, k)) == getattr(config, k) for k in sampling.SAMPLE_OPTIONS if k != 'seed'), words
    assert training.sample_command(TrainConfig(out='runs/k')) == 'egrpo sample --model runs/k/model'
    evaluated_finer = TrainConfig(out='runs/k', num_steps=4, eval_steps=40)
    assert training.sample_command(evaluated_finer) == 'egrpo sample --model runs/k/model --num-steps 40'


def test_evaluate_puts_the_lora_in(folder):
    scores = folder/'lora.csv'
    assert main(shlex.split(f'evaluate --lora {folder}/lora/model --size 8 --num-steps 6 --device cpu --out {scores}')) == 0
    before, after = tables.ends(pd.read_csv(folder/'lora/evaluations.csv'))
    assert (before.verifier - after.verifier).abs().max() > 1e-3
    np.testing.assert_allclose(values(scores), after[['verifier', 'verifier_strict']], atol=1e-3)


def test_dropout_of_a_lora_sleeps(tmp_path):
    "Two equal calls give equal images."
    pipeline = load_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=.5, target_modules=['to_q', 'to_k']))
    for n, p in pipeline.transformer.named_parameters(): p.data += .1 * ('lora_B' in n)
    state, config = get_peft_model_state_dict(pipeline.transformer), pipeline.transformer.peft_config['default']
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict())
    policy = sampling.load_sampler(TrainConfig(device='cpu'), tmp_path)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == .5 for m in policy.transformer.modules())
    first, again = (sample_images(policy, ['a red circle'], 2) for _ in range(2))
    assert torch.equal(first, again)


def test_sample(here, monkeypatch):
    drawn, grid = [], plots.image_grid
    monkeypatch.setattr(plots, 'image_grid', lambda *args, columns: drawn.append((*args, columns)) or grid(*args, columns))
    words = "sample --prompt 'a red circle' --prompt 'a cat' --images 3 --num-steps 4 --device cpu --out new/grid.png --each"
    assert main(shlex.split(words)) == 0
    images, titles, columns = drawn[0]
    assert len(images) == 6 and columns == 3 and titles == ['a red circle'] * 3 + ['a cat'] * 3
    assert min((images[i] - images[j]).abs().max() for i in range(3) for j in range(i)) > .01
    assert (here/'new/grid.png').stat().st_size > 5_000
    each = sorted((here/'new/grid').iterdir())
    assert [p.name for p in each] == [*(f'000{i}_a_red_circle.png' for i in range(3)), *(f'000{i}_a_cat.png' for i in range(3, 6))]
    with Image.open(each[4]) as picture:
        about = {name: picture.text[name] for name in ('prompt', 'seed', 'place', 'model', 'steps')}
        assert about == dict(prompt='a cat', seed='0', place='4', model='miniature', steps='4')
        assert to_image(images[4]).tobytes() == picture.tobytes()
    assert main(shlex.split("sample --prompt 'a red circle' --num-steps 4 --device cpu --seed 1")) == 0
    assert (drawn[1][0][0] - images[0]).abs().max() > .01 and drawn[1][1][0][0] in '✓✗'


def test_train_reports_where_things_are(folder, capsys):
    assert main(['train', *small, '--iterations', '3', '--lr', '1e-3', '--out', str(folder/'full'), '--resume']) == 0
    out = capsys.readouterr().out
    assert out.startswith('     plan') and 'before and after 3 iterations' in out and f'egrpo sample --model {folder}/full/model' in out
    assert len((folder/'full/metrics.jsonl').read_text().splitlines()) == 3


def test_demo(here, capsys):
    words = shlex.split('demo --scale smoke --device cpu')
    assert main(words) == 0
    first, out = json.loads((here/'runs/demo/demo.json').read_text()), capsys.readouterr().out
    before, after = tables.ends(pd.read_csv(here/'runs/demo/evaluations.csv'))
    change = (after.verifier - before.verifier).mean()
    assert first['iterations'] == 2 and first['scores']['verifier']['change']['all'][0] == pytest.approx(change, abs=1e-6)
    assert out.count('\nall ') == 2 and 'verifier_strict' in out and 'runs/demo/demo.png' in out
    pixels = plt.imread(here/'runs/demo/demo.png')
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900 # taller where a mark has changed
    assert main([*words, '--minutes', '0.0001']) == 0 # again in the same folder, and stopped by the clock
    assert json.loads((here/'runs/demo/demo.json').read_text())['iterations'] == 1
    assert len((here/'runs/demo/metrics.jsonl').read_text().splitlines()) == 1


def test_demo_replaces_only_what_a_demo_wrote(here):
    demo.clear_demo('ours')
    (here/'ours/model').mkdir()
    (here/'ours/notes.txt').write_text('mine')
    assert sorted(p.name for p in demo.clear_demo('ours').iterdir()) == ['demo.json', 'notes.txt']
    (here/'yours').mkdir()
    (here/'yours/model').write_text('precious')
    assert main(shlex.split('demo --scale smoke --out yours')) == 2
    assert [p.read_text() for p in (here/'yours').iterdir()] == ['precious']


def test_demo_shows_the_images_that_were_scored(here):
    trainer = Trainer(TrainConfig(num_steps=6, active_steps=2, eval_size=12, device='cpu', ema_decay=.9))
    with torch.no_grad(): # an average that differs from the weights is what is evaluated, and so what is shown
        for e in trainer.ema.values(): e.mul_(.98)
    places, frame = [0, 3, 7], trainer.evaluate()
    from egrpo.miniature.world import verify_batch
    from egrpo.paper.cells import images_at
    prompts = [trainer.eval_prompts[i] for i in places]
    seen = [v.graded for v in verify_batch(images_at(trainer, places), prompts)]
    np.testing.assert_allclose(seen, frame.verifier.iloc[places], atol=1e-3)
    assert torch.equal(images_at(trainer, places, dict(trainer.ema)), images_at(trainer, places))
    others = images_at(trainer, places, {name: p.detach().clone() for name, p in trainer.parameters.items()})
    assert (others - images_at(trainer, places)).abs().max() > .01


def test_demo_says_what_it_trained_and_what_the_rest_did(here, capsys):
    assert main(shlex.split('demo --scale smoke --device cpu')) == 0
    out = capsys.readouterr().out
    before, after = tables.ends(pd.read_csv(here/'runs/demo/evaluations.csv'))
    places = demo.trained_places(list(before.prompt), 'shapes:two_objects,counting')
    assert 'trained: two objects and counting (4 held-out prompts): verifier_strict' in out
    assert 'the six categories (12 held-out prompts): verifier_strict' in out
    told = json.loads((here/'runs/demo/demo.json').read_text())['trained']
    change = (after.verifier_strict - before.verifier_strict).iloc[places]
    assert told['prompts'] == 4 and told['change'][0] == pytest.approx(change.mean(), abs=1e-9)
    assert (told['better'], told['worse']) == (sum(change == 1), sum(change == -1))


def test_time_limit(monkeypatch):
    clock = [100.]
    monkeypatch.setattr(demo.time, 'monotonic', lambda: clock[0])
    stop = demo.time_is_up(1, began=90)
    asked = []
    for clock[0] in (110, 130, 134, 140): asked.append(stop(None)) # noqa: B020 first question after 10 s: 15 s are kept back
    assert asked == [False, False, False, True]


def test_reproduce(here, monkeypatch, capsys):
    monkeypatch.setenv('EGRPO_FIGURES', str(here/'figures'))
    assert main(['reproduce']) == 0
    assert 'Table 4' in capsys.readouterr().out
    assert main(shlex.split('reproduce entropy_by_step --scale smoke')) == 0
    assert not (here/'figures').exists() and (here/'runs/smoke/entropy_by_step.json').exists()
    assert main(shlex.split('reproduce entropy_by_step')) == 0
    assert json.loads((here/'figures/entropy_by_step.json').read_text())['scale'] == 'mini'
    assert "merging raises a step's entropy: holds | by 45% to 58%" in capsys.readouterr().out


def test_records_say_what_they_found():
    "Every record here: times for the benchmarks, a verdict for each claim, nothing for the rest."
    claimed = {c.record for c in CLAIMS}
    for path in sorted((Path(__file__).parent.parent/'figures').glob('*.json')):
        if path.stem not in EXPERIMENTS: continue
        lines = paper.findings(path.stem, json.loads(path.read_text())['data'])
        assert bool(lines) == (path.stem in claimed or path.stem in ('speed', 'attention_benchmark')), path.stem
    times = dict(line.split(' takes ') for line in paper.findings('speed', load_record('speed')['data']))
    assert float(times['one by one'].split()[0]) > 3 # what is asked of it


# ---- as the shell sees it

def test_installed_command_demonstrates_from_any_folder(tmp_path):
    done = run('demo --scale smoke', tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'before and after 2 iterations' in done.stdout and (tmp_path/'runs/demo/demo.png').exists()
    assert 'Warning' not in done.stderr and 'torchvision' not in done.stderr, done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path):
    done = subprocess.run(f'{command} plan | head -n 1', shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.startswith('step') and not done.stderr, done.stderr


def test_plan_counts_memory_for_a_device(capsys):
    "One option of the group is enough."
    for words in ('--device-memory 24', '--processes 2', '--seconds-forward 1 --seconds-backward 2'):
        assert main(shlex.split(f'plan {words}')) == 0
        assert 'one device holds, GiB' in capsys.readouterr().out
    lora = assets_path().parent/'none'
    assert main(['plan', 'flux_lora_80gb', '--lora-from', str(lora)]) == 2
    assert f"lora_from: '{lora}' does not exist" in capsys.readouterr().err
    assert main(shlex.split('plan --seconds-backward 2')) == 2
    assert 'seconds-forward and seconds-backward go together' in capsys.readouterr().err


def test_dry_run_refuses_what_the_run_would(capsys, tmp_path):
    "A setting of AEGPO for another method; prompts that the reward cannot read; and the base's published loss is AEGPO's."
    assert main(shlex.split('train --dry-run --top 4')) == 2
    assert 'top is no setting of egrpo: leave it out, or take aegpo' in capsys.readouterr().err
    (tmp_path/'prompts.txt').write_text('a red circle\na cat\n')
    words = ['train', '--dry-run', '--prompts', str(tmp_path/'prompts.txt')]
    assert main(words) == 2
    assert "reward 'verifier' is the miniature's" in capsys.readouterr().err
    assert main([*words, '--reward', 'hpsv2.1']) == 0
    for more, says in (('--model nosuchfolder', "model 'nosuchfolder' is no folder here and no hub id"),
                       ('--model runs/k/model', 'is no folder here'), (f'--resume --out {tmp_path}/none', 'resume: no checkpoint in'),
                       ('--reward math:sqrt', "reward 'math:sqrt' raised TypeError"),
                       ('--eval-rewards math:sqrt', "reward 'math:sqrt' raised TypeError")):
        assert main(shlex.split(f'train --dry-run {more}')) == 2
        assert says in capsys.readouterr().err
    assert main(shlex.split('train --dry-run --model black-forest-labs/FLUX.1-dev')) == 0
    assert [published('aegpo', base)['beta'] for base in (None, 'flow_grpo')] == [0., .04]


def test_what_stands_on_a_base_is_published_as_its_base(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', lambda base='dance_grpo', **settings: METHODS['aegpo'](base, **settings))
    assert published('mine', 'flow_grpo')['beta'] == .04
    assert published('egrpo', 'flow_grpo')['beta'] == 0.


def test_a_method_of_ones_own_by_its_place(here, monkeypatch, capsys):
    "For plan, train and as a base; a run keeps the name."
    code = "METHODS['egrpo'](num_steps, tau=0, active_steps=2, num_generations=num_generations)"
    head = 'from egrpo.methods.registry import METHODS\nn = 3\ndef two(num_steps=16, num_generations=12, tau=0.): return '
    (here/'mine.py').write_text(f'{head}{code}\n')
    known = dict(METHODS)
    for words in ('--method mine.py:two', '--method aegpo --base mine.py:two --top 1'):
        assert main(shlex.split(f'plan {words} --num-steps 6 --num-generations 4')) == 0
        assert ' images of a prompt take' in capsys.readouterr().out
    assert main(['train', *small[:2], *small[4:], '--iterations', '1', '--method', 'mine.py:two', '--out', 'run']) == 0
    assert json.loads(Path('run/config.json').read_text())['method'] == 'mine.py:two'
    assert dry('--resume --out run', monkeypatch).method == 'mine.py:two'
    for name, says in (('two_', "method 'mine.py:two_' cannot be imported"), ('n', "method 'mine.py:n' is a int: name a function")):
        assert main(['plan', '--method', f'mine.py:{name}']) == 2
        assert says in capsys.readouterr().err
    assert known == METHODS and find_method('mine.py:two').__name__ == 'two'


def test_the_line_below_the_methods_shows_what_the_table_says(capsys):
    assert main(['methods']) == 0
    out = capsys.readouterr().out
    assert main(shlex.split(re.search(r'egrpo (plan [^;]+)', out)[1])) == 0
    assert re.search(r'flow_grpo .*? (\d+) of', out)[1] == str(sum(line.endswith('●') for line in capsys.readouterr().out.splitlines()))


@pytest.mark.parametrize('words, says', [('train --num-step 3', '--num-step, did you mean --num-steps? (see egrpo train --help)'),
                                         ('train --foo', '--foo (see egrpo train --help)'), ('--vresion', 'did you mean --version?')])
def test_an_option_that_is_none(words, says, capsys):
    assert main(words.split()) == 2
    assert says in capsys.readouterr().err


def test_lines_are_as_wide_as_the_terminal(monkeypatch, capsys):
    "Of what goes to a file none is broken."
    monkeypatch.setenv('COLUMNS', '80')
    text = 'short\n\n' + 'a word and  another ' * 12
    assert shared.fold(text) == text
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    lines = shared.fold(text).split('\n')
    assert lines[:2] == ['short', ''] and max(map(len, lines)) <= 80 and all(line.startswith('    ') for line in lines[3:])
    assert ' '.join(lines).split() == text.split()
    for words in ('reproduce', 'plan --tau 1.8'):
        assert main(words.split()) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize('words, says', [
    ('--window 3', 'window is no setting of egrpo'), ('--method dance_grpo --tau 1.8', 'tau is no setting of dance_grpo'),
    ('--method aegpo --keep .5', 'keep is no setting of aegpo'), ('--method aegpo --base egrpo --train-share .5', 'no setting of egrpo')])
def test_a_setting_the_method_has_no_use_for(words, says, capsys):
    "It is refused, not ignored; those of the scale are not meant."
    for command in ('plan', 'train --dry-run'):
        assert main(shlex.split(f'{command} {words}')) == 2
        assert says in capsys.readouterr().err
    assert main(shlex.split('plan --method aegpo --base egrpo --tau 1.8')) == 0


@pytest.mark.parametrize('method', METHODS)
def test_every_method_at_every_scale(method, monkeypatch):
    "A scale has settings that some methods have no use for: they are left out."
    for scale in ('smoke', 'mini', 'gpu'):
        words = f'--scale {scale} --method {method}'
        assert main(shlex.split(f'train --dry-run {words}')) == 0
        with monkeypatch.context() as patch: config = dry(words, patch)
        assert config.method == method
        assert config.plan.get('stride') == (SCALES[scale].settings.get('stride') if 'stride' in method_settings(method) else None)


def commands_of_the_guides():
    "Every `egrpo …` in the notebooks' blocks of shell: (notebook, words)."
    for path in sorted((Path(__file__).parent.parent/'nbs').rglob('*.ipynb')):
        for cell in json.loads(path.read_text())['cells']:
            if cell['cell_type'] != 'markdown': continue
            for block in re.findall(r'```(?:sh|bash)\n(.*?)```', ''.join(cell['source']), re.DOTALL):
                for line in block.replace('\\\n', ' ').splitlines():
                    words = shlex.split(line, comments=True)
                    if 'egrpo' in words and '…' not in line: yield path.stem, words[words.index('egrpo') + 1:]


def test_the_guides_commands_are_understood(tmp_path, monkeypatch, capsys):
    "A reader types them as they stand; plans are computed, and runs are refused here if they would be there."
    monkeypatch.chdir(tmp_path)
    found = list(commands_of_the_guides())
    assert len(found) >= 10
    for notebook, words in found:
        try: args = entry.make_parser().parse_args(words)
        except (ValueError, SystemExit) as e: pytest.fail(f"{notebook}: egrpo {' '.join(words)}: {e}")
        if args.command == 'plan': assert main(words) == 0, (notebook, capsys.readouterr().err)
        if args.command == 'train':
            config = TrainConfig(**planning.preset(args.scale) | shared.given(args, options.config_options()))
            check_config(config)
            check_method(config.method, config)


def test_tune_names_a_suffix(tmp_path, monkeypatch, capsys):
    "The cheapest that keeps the order."
    monkeypatch.chdir(tmp_path)
    words = 'tune --suffix --device cpu --most 1 --num-steps 4 --probe-prompts 1 --reward preference --agreement -1'
    assert main(shlex.split(words)) == 0
    out = capsys.readouterr().out
    assert 'agreement' in out and re.search(r'saves most and keeps -1: --solver (euler|ab2) --stride 3', out)
    assert not [*tmp_path.iterdir()]
