"Are the notebooks clean, and do egrpo/*.py, README.md and PAPERS.md say what they should? Looks at a copy; writes only when told to."
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
remedy = 'run `make notebooks`'


def notebooks(
    folder:Path=root/'nbs', # Where to look
)->list: # Paths, sorted
    "Every notebook, without Jupyter's own checkpoints and what nbdev itself skips."
    found = sorted(Path(folder).rglob('*.ipynb'))
    return [p for p in found if not any(part[0] in '._' for part in p.relative_to(folder).parts)]


def nbdev(
    command:str, # nbdev_clean or nbdev_export
    folder:Path, # A project's top level
)->None: # Its files are rewritten
    "Run one of nbdev's commands in `folder`."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    done = subprocess.run([Path(sys.executable).parent/command], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'{command} failed:\n{done.stdout}{done.stderr}')


# what JupyterLab writes into a notebook that it opens: with it, a notebook that is only looked at is not modified
METADATA = {
    'kernelspec': {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'},
    'language_info': {
        'codemirror_mode': {'name': 'ipython', 'version': 3}, 'file_extension': '.py', 'mimetype': 'text/x-python', 'name': 'python',
        'nbconvert_exporter': 'python', 'pygments_lexer': 'ipython3', 'version': '3.11.7',
    },
}
WIDGET = 'application/vnd.jupyter.widget-view+json'


def kept(
    output, # An output of a cell
): # The same without what needs a running kernel; None where nothing is left
    "Drop widgets' views, beside which a picture may stay, and whatever libraries print on stderr."
    if output.get('name') == 'stderr': return None
    if WIDGET not in output.get('data', {}): return output
    data = {kind: content for kind, content in output['data'].items() if kind not in (WIDGET, 'text/plain')}
    return output | {'data': data} if data else None


def tidy(
    path:Path, # A notebook, cleaned by nbdev
)->None: # It is rewritten where that changes something
    "Leave in a notebook's outputs what a reader without a kernel can see, and give it complete metadata."
    nb = json.loads(path.read_text(encoding='utf-8'))
    outputs = [cell['outputs'] for cell in nb['cells'] if cell['cell_type'] == 'code']
    before = json.dumps(nb)
    for own in outputs: own[:] = filter(None, map(kept, own))
    nb['metadata'] = METADATA
    if json.dumps(nb) == before: return
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def copy(
    folder:Path, # Empty, outside the repository
)->Path: # The same
    "Copy the notebooks and settings, and nothing exported, into `folder`."
    for nb in notebooks():
        to = folder/nb.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nb, to)
    rooms = [p.relative_to(root) for p in (root/'egrpo').rglob('__init__.py')]
    for f in (Path('settings.ini'), Path('setup.py'), *rooms):
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, folder/f)
    return folder


def sources(
    folder:Path, # A project's top level
)->dict: # Name from the top level → bytes
    "The files that nbdev writes: notebooks and modules."
    files = notebooks(folder/'nbs') + sorted((folder/'egrpo').rglob('*.py'))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def differences(
    ours:dict, # Name → bytes, as they are
    fresh:dict, # Name → bytes, as nbdev writes them
)->list: # One line for each file
    "What a clean export would change."
    say = [f'{f}: no notebook writes it: delete it' for f in sorted(ours.keys() - fresh.keys())]
    say += [f'{f}: not exported: {remedy}' for f in sorted(fresh.keys() - ours.keys())]
    changed = [f for f in sorted(ours.keys() & fresh.keys()) if ours[f] != fresh[f]]
    return say + [f'{f}: {"not clean" if f.endswith(".ipynb") else "not what its notebook says"}: {remedy}' for f in changed]


def rewrite(
    folder:Path, # A project's top level
)->None: # Its notebooks and modules are rewritten
    "Clean the notebooks and export the modules."
    nbdev('nbdev_clean', folder)
    for path in notebooks(folder/'nbs'): tidy(path)
    nbdev('nbdev_export', folder)


def fresh()->dict: # Name from the top level → bytes
    "The notebooks cleaned and the modules exported from them, in a copy: the working tree is never touched."
    with tempfile.TemporaryDirectory() as tmp:
        folder = copy(Path(tmp).resolve())
        rewrite(folder)
        return sources(folder)


def check()->list: # One line for each file out of step, empty when all is well
    "What `make notebooks` would change."
    say = differences(sources(root), fresh())
    if not readme_is_current(): say.append(f'README.md: not what nbs/index.ipynb says: {remedy}')
    if not papers_are_current(): say.append(f'PAPERS.md: not what the records say: {remedy}')
    return say


def relink(
    text:str, # Markdown with links as they work from nbs/
)->str: # The same from the top level
    "`../figures/a.png` becomes `figures/a.png`, and `40_x.ipynb` becomes `nbs/40_x.ipynb`; addresses and anchors stay."
    def move(m):
        target = m[2]
        if re.match(r'[a-z]+:|#|/', target): return m[0]
        return m[1] + (target[3:] if target.startswith('../') else f'nbs/{target}') + m[3]
    return re.sub(r'(\]\(|(?:src|href)=")([^)"\s]+)([)"])', move, text)


def shown(
    cell, # A cell
): # The same, or what it shows where its code is collapsed
    "The cell as a reader of the page sees it."
    import nbformat
    if cell.cell_type == 'markdown' or not cell.metadata.get('jupyter'): return cell
    texts = [output.data.get('text/markdown', '') for output in cell.outputs]
    return nbformat.v4.new_markdown_cell(''.join(texts))


def readme(
    nb:Path=root/'nbs/index.ipynb', # The front page
)->str: # Markdown
    "The front page as README.md: nbconvert's Markdown without nbdev's directives, links made to work from the top level."
    import nbformat
    from nbconvert import MarkdownExporter
    page = nbformat.read(nb, 4)
    page.metadata['language_info'] = {'name': 'python'}
    for cell in page.cells: cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
    page.cells = [shown(c) for c in page.cells if c.source.strip() and not c.source.startswith('#|')]
    text, _ = MarkdownExporter().from_notebook_node(page)
    lines = [line.rstrip() for line in relink(text).strip().split('\n')]
    note = '<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->'
    return re.sub(r'\n{3,}', '\n\n', '\n'.join([note, '', *lines])) + '\n'


def readme_is_current()->bool: # True also before there is a front page
    "Does README.md say what nbs/index.ipynb says?"
    if not (root/'nbs/index.ipynb').exists(): return True
    return (root/'README.md').exists() and (root/'README.md').read_text(encoding='utf-8') == readme()


def papers()->str: # Markdown
    "Every claim with its verdict, from the records, as PAPERS.md."
    sys.path.insert(0, str(root))
    from egrpo.paper.claims import papers_markdown
    return '<!-- Written by `make notebooks` from the records in figures/. -->\n\n' + relink(papers_markdown())


def papers_are_current()->bool: # True also before there are claims
    "Does PAPERS.md say what the records say?"
    if not (root/'egrpo/paper/claims.py').exists(): return True
    return (root/'PAPERS.md').exists() and (root/'PAPERS.md').read_text(encoding='utf-8') == papers()


def exported(
    path:Path, # A module
)->bool: # Did nbdev write it?
    "A module that says it was generated; one written by hand is left alone, and reported by `check`."
    return 'AUTOGENERATED! DO NOT EDIT!' in path.read_text(encoding='utf-8')


def write()->None: # Rewrites what differs in nbs/, egrpo/*.py, README.md and PAPERS.md
    "Clean, export, drop modules whose notebook is gone, and write the front page and the claims."
    ours, new = sources(root), fresh()
    for f in ours.keys() - new.keys():
        if exported(root/f): (root/f).unlink()
    for f, content in new.items():
        if ours.get(f) != content: (root/f).write_bytes(content)
    if (root/'nbs/index.ipynb').exists(): (root/'README.md').write_text(readme(), encoding='utf-8')
    if (root/'egrpo/paper/claims.py').exists(): (root/'PAPERS.md').write_text(papers(), encoding='utf-8')


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else 'check'
    if what == 'write': write()
    elif what == 'readme': (root/'README.md').write_text(readme(), encoding='utf-8')
    elif what == 'check':
        if say := check(): sys.exit('\n'.join(say))
    else: sys.exit(f'sync.py: check, write or readme, got {what}')
