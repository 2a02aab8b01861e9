"Drive JupyterLab in a real browser: what a reader sees, presses and saves. `make browser` runs it on a copy of the working tree."
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sync
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright

root = sync.root
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
LONG = 300_000 # ms that a notebook may take
RUN = [ # notebooks that are run from top to bottom and saved
    'nbs/index.ipynb', 'nbs/core/02_entropy.ipynb', 'nbs/core/03_plan.ipynb', 'nbs/show/01_widgets.ipynb',
    'nbs/figures/egrpo/fig1b_entropy.ipynb',
]
STOP = '''from egrpo import TrainConfig, Trainer
import tempfile
small = dict(num_generations=2, active_steps=1, num_steps=6, prompts_per_iteration=1, eval_size=1)
Trainer(TrainConfig(**small, iterations=10000, out=tempfile.mkdtemp())).fit()'''


def copied(
    folder:Path, # Empty
)->Path: # The copy, with its own git history
    "Copy what git knows, and what it would, so that nothing here is touched."
    files = subprocess.check_output(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, text=True).split('\n')
    for name in filter(None, files):
        if name.startswith('figures/cells/') or not (root/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, folder/name)
    for words in (['init', '-q'], ['add', '-A'], ['-c', 'user.name=x', '-c', 'user.email=x@x', 'commit', '-qm', 'as it was']):
        subprocess.check_call(['git', *words], cwd=folder)
    return folder


@contextmanager
def lab(
    folder:Path, # The server's root
): # Address of the landing page
    "JupyterLab as `make lab` starts it."
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    makefile = (root/'Makefile').read_text(encoding='utf-8')
    options = re.search(r'jupyter lab (.*) \$\(ARGS\)', makefile)[1].split()
    more = ['--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=']
    own = tempfile.mkdtemp(prefix='egrpo-lab-') # the user's own JupyterLab keeps its theme and its windows
    env = os.environ | dict(PYTHONPATH=str(folder), EGRPO_SCALE='smoke', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    env |= dict(JUPYTERLAB_SETTINGS_DIR=f'{own}/settings', JUPYTERLAB_WORKSPACES_DIR=f'{own}/workspaces')
    server = subprocess.Popen([Path(sys.executable).parent/'jupyter', 'lab', *options, *more], cwd=folder, env=env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f'{address}/api', timeout=5)
            except OSError: time.sleep(.5)
            else: break
        yield address
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(own)


def wait_until_idle(
    page, # A page that shows a notebook
):
    "Wait for the kernel; between two cells, and before it is connected, it looks idle for a moment."
    idle = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
    steady, end = 0, time.monotonic() + LONG / 1000
    while steady < 6:
        if time.monotonic() > end: raise TimeoutError('the kernel is not idle')
        steady = steady + 1 if page.evaluate(idle) else 0
        page.wait_for_timeout(300)


def open_notebook(
    page, # A page of the browser
    address:str, # The server's
    path:str, # From the server's root
):
    "Open one notebook alone, with its kernel."
    page.goto(f'{address}/lab/tree/{path}?reset')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=LONG)
    wait_until_idle(page)


def run_all(
    page, # A page that shows a notebook
):
    "Run All, and wait for the end."
    page.click('.lm-MenuBar-itemLabel >> text=/^Run$/')
    page.click('.lm-Menu-itemLabel >> text=/^Run All Cells$/')
    try: page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="busy"]', state='attached', timeout=10_000)
    except PlaywrightTimeout: pass # so short that nobody saw it busy
    wait_until_idle(page)


def errors(page)->list: # Lines
    "What looks broken in the notebook that is shown."
    said = page.eval_on_selector_all('.jp-OutputArea-output', 'all => all.map(o => o.innerText)')
    found = [text.strip().split('\n')[-1] for text in said if 'Error displaying widget' in text or re.search(r'^\w*Error', text, re.M)]
    lost = page.eval_on_selector_all('img', 'all => all.filter(o => o.complete && !o.naturalWidth).map(o => o.alt || o.src)')
    return found + [f'picture {name!r} is not there' for name in lost]


def landing(page, address, shots):
    "The landing notebook opens by itself; its picture and links are there; no news question."
    page.goto(address)
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=LONG)
    page.wait_for_selector('img[alt^="E-GRPO on two"]', timeout=LONG)
    time.sleep(2)
    page.screenshot(path=shots/'landing.png')
    assert page.url.endswith('/lab/tree/nbs/index.ipynb'), page.url
    assert not page.query_selector('text=/Jupyter news/'), 'JupyterLab asks about news'
    assert not errors(page), errors(page)
    links = page.eval_on_selector_all('.jp-RenderedMarkdown a[href]', "all => all.map(o => o.getAttribute('href'))")
    return f'{len(links)} links, picture shown'


def dark(page, address, shots):
    "The same in the dark theme."
    page.goto(address)
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=LONG)
    page.click('text=Settings >> nth=0')
    page.hover('.lm-Menu-itemLabel >> text=Theme')
    page.click('.lm-Menu-itemLabel >> text=JupyterLab Dark')
    page.wait_for_timeout(2000)
    page.screenshot(path=shots/'dark.png')
    return 'screenshot'


def stop(page, address, shots):
    "The stop button ends Run All: the training cell fails with where its checkpoint is, the next cell does not run."
    import nbformat
    cells = [nbformat.v4.new_code_cell(STOP), nbformat.v4.new_code_cell("print('went on')")]
    nb = nbformat.v4.new_notebook(cells=cells, metadata=sync.METADATA)
    nbformat.write(nb, page.folder/'nbs/stop.ipynb')
    open_notebook(page, address, 'nbs/stop.ipynb')
    page.click('.lm-MenuBar-itemLabel >> text=/^Run$/')
    page.click('.lm-Menu-itemLabel >> text=/^Run All Cells$/')
    printed = "[...document.querySelectorAll('.jp-OutputArea-output')].map(o => o.innerText).join(' ')"
    page.wait_for_function(f"/[2-9]\\/10000/.test({printed})", timeout=LONG)
    page.click('[data-command="notebook:interrupt-kernel"], [title^="Interrupt the kernel"] >> nth=0')
    page.wait_for_function(f"{printed}.includes('resume=True')", timeout=LONG)
    page.wait_for_timeout(1000)
    page.screenshot(path=shots/'stop.png')
    said = page.evaluate(printed)
    (page.folder/'nbs/stop.ipynb').unlink()
    assert 'went on' not in said
    return re.search(r'stopped after iteration \d+', said)[0]


def pixels(
    png:str, # base64
)->np.ndarray: # (H,W,3) levels
    "Decode a picture."
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')).astype(float)


def alike(
    old:dict, # An output of a cell
    new:dict, # The same after it ran again
)->bool: # True also where a picture differs by what another processor rounds otherwise
    "Compare outputs."
    parts = [dict(output.get('data', {})) for output in (old, new)]
    pictures = [''.join(part.pop('image/png', '')) for part in parts]
    if old | dict(data=parts[0]) != new | dict(data=parts[1]): return False
    if pictures[0] == pictures[1] or not all(pictures): return pictures[0] == pictures[1]
    before, after = map(pixels, pictures)
    return before.shape == after.shape and abs(before - after).mean() < 1e-3


def changes(
    folder:Path, # A repository
)->list: # Lines
    "Say which files and cells differ from the last commit."
    status = subprocess.check_output(['git', 'status', '--porcelain'], cwd=folder, text=True)
    found = []
    for line in status.splitlines():
        path = line[3:]
        if not line.startswith(' M') or not path.endswith('.ipynb'):
            found.append(line)
            continue
        was = json.loads(subprocess.check_output(['git', 'show', f'HEAD:{path}'], cwd=folder))['cells']
        now = json.loads((folder/path).read_text(encoding='utf-8'))['cells']
        if [c['source'] for c in was] != [c['source'] for c in now]: found.append(f'{path}: another source')
        for old, new in zip(was, now):
            outputs = old.get('outputs', []), new.get('outputs', [])
            if len(outputs[0]) != len(outputs[1]) or not all(map(alike, *outputs)): found.append(f'{path}: {old["id"]}')
    return found


def save(
    page, # A page that shows a notebook
):
    "Save the notebook, and wait until it is on the disk."
    page.keyboard.press('Escape')
    page.keyboard.press('Control+s')
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    page.wait_for_timeout(500)


def clean(page, address, shots):
    "Run All, save, `make notebooks`: git shows nothing, but for the rounding of pictures, and nothing looked broken."
    faults = []
    for path in RUN:
        began = time.monotonic()
        open_notebook(page, address, path)
        opened = time.monotonic() - began
        run_all(page)
        page.wait_for_timeout(1500)
        faults += [f'{path}: {line}' for line in errors(page)]
        page.screenshot(path=shots/f'{Path(path).stem}.png')
        save(page)
        print(f'          {path}: opened in {opened:.0f} s, run and saved in {time.monotonic() - began - opened:.0f} s', flush=True)
    subprocess.check_call([sys.executable, page.folder/'tests/sync.py', 'write'], cwd=page.folder)
    faults += changes(page.folder)
    assert not faults, '\n'.join(faults)
    return f'{len(RUN)} notebooks'


def widgets(page, address, shots):
    "Controls redraw the picture."
    open_notebook(page, address, 'nbs/guides/start_here.ipynb')
    run_all(page)
    assert not errors(page), errors(page)
    image = page.locator('.widget-image, img.jupyter-widgets').first
    before = image.get_attribute('src')
    slider = page.locator('.widget-readout').first
    slider.click()
    page.keyboard.press('Control+a')
    page.keyboard.type('3.0')
    began = time.monotonic()
    page.keyboard.press('Enter')
    while image.get_attribute('src') == before: page.wait_for_timeout(50)
    seconds = time.monotonic() - began
    image.scroll_into_view_if_needed()
    page.screenshot(path=shots/'widgets.png')
    assert image.evaluate('o => o.width <= o.naturalWidth'), 'a picture is stretched'
    return f'redrawn in {seconds:.2f} s'


def opened(page, address, shots):
    "A notebook that is only opened is not modified; its metadata are what JupyterLab would write, for our version of Python."
    open_notebook(page, address, 'nbs/core/00_sigmas.ipynb')
    page.wait_for_timeout(3000)
    assert not page.query_selector('.jp-mod-dirty'), 'JupyterLab shows it as modified'
    return 'not modified'


CHECKS = dict(landing=landing, dark=dark, opened=opened, widgets=widgets, stop=stop, clean=clean)


def main(
    names, # Some of `CHECKS`; none = all
)->int: # Checks that failed
    "Print a line for each check."
    shots = Path(os.environ.get('EGRPO_SHOTS') or tempfile.mkdtemp(prefix='egrpo-shots-'))
    shots.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as play:
        folder = copied(Path(tmp).resolve())
        browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        with lab(folder) as address:
            for name in names or CHECKS:
                page = browser.new_page(viewport=dict(width=1400, height=900))
                page.set_default_timeout(60_000)
                page.folder = folder
                try: said = f'ok: {CHECKS[name](page, address, shots)}'
                except Exception as e:
                    page.screenshot(path=shots/f'{name}_failed.png')
                    said, failed = f'NO: {type(e).__name__}: {e}', failed + 1
                print(f'{name:<9} {said}', flush=True)
                page.close()
        browser.close()
    print(f'screenshots: {shots}')
    return failed


if __name__ == '__main__':
    if not CHROMIUM: sys.exit('make browser: no Chromium found: apt-get install chromium')
    sys.exit(main(sys.argv[1:]))
