"Write the site: a page for every notebook and every public name, with what it needs to be read without a network."
import ast
import importlib
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import sync
import yaml
from latex2mathml.converter import convert as mathml
from nbconvert import MarkdownExporter

root = sync.root
site = root/'_site'
docs = site/'docs'

TABS = { # Title of a tab -> folders of notebooks
    'Guides': ['guides'],
    'E-GRPO': ['figures/egrpo'],
    'AEGPO': ['figures/aegpo'],
    'Beyond': ['figures/ours'],
    'Library': 'core models methods miniature rewards show train paper cli base testing'.split(),
}
CONFIG = dict(
    site_name='egrpo',
    site_description='Aligns text-to-image flow models with human preference, and reproduces E-GRPO and AEGPO',
    docs_dir='docs',
    site_dir='html',
    use_directory_urls=False,
    theme=dict(
        name='material',
        font=False,
        features='navigation.tabs navigation.top navigation.indexes navigation.footer search.suggest content.code.copy toc.follow'.split(),
        palette=[
            dict(media='(prefers-color-scheme: light)', scheme='default', primary='indigo',
                 toggle=dict(icon='material/weather-night', name='Dark')),
            dict(media='(prefers-color-scheme: dark)', scheme='slate', primary='indigo',
                 toggle=dict(icon='material/weather-sunny', name='Light')),
        ],
    ),
    plugins=['search', 'offline'],
    extra_css=['egrpo.css'],
    markdown_extensions=['admonition', 'tables', 'md_in_html', dict(toc=dict(permalink=True)),
                         'pymdownx.highlight', 'pymdownx.superfences'],
    validation=dict(links=dict(anchors='warn')),
)
CSS = """
.md-typeset img { background: white; border-radius: 2px; }
.md-typeset pre > code { white-space: pre-wrap; }
.md-typeset .dataframe { font-size: .7rem; display: block; overflow-x: auto; }
.md-typeset .dataframe th, .md-typeset .dataframe td { padding: .2rem .5rem; }
.md-typeset math[display=block] { overflow-x: auto; margin: 1em 0; }
.md-typeset table:not([class]) { display: block; overflow-x: auto; }
"""
CODE = re.compile(r'(```.*?```|`[^`\n]*`)', re.S)
MATH = re.compile(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', re.S)
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s]+)([)"])')


def with_mathml(
    text:str, # Markdown with LaTeX between dollars
)->str: # Markdown with MathML, which browsers draw by themselves
    "Turn formulas into MathML, outside of code."
    def formula(m): return mathml(m[1] or m[2], display='block' if m[1] else 'inline')
    pieces = CODE.split(text)
    return ''.join(piece if piece.startswith('`') else MATH.sub(formula, piece) for piece in pieces)


def page_path(
    path:Path, # A notebook, a folder of notebooks, a Markdown page, or a file beside the records
)->str|None: # Its page, from the top of the site; None = it has none
    "Find the page of a file of the repository."
    if path == root/'nbs': return 'index.md'
    if path == root/'figures': return 'figures/index.md'
    if path.is_relative_to(root/'nbs'):
        inside = path.relative_to(root/'nbs')
        if path.suffix == '.ipynb': return inside.with_suffix('.md').as_posix()
        return (inside/'index.md').as_posix() if path.is_dir() else None
    if path.is_relative_to(root/'figures') and path.is_file(): return 'records/' + path.name
    if path.parent == root and path.suffix == '.md': return path.name.lower()
    return None


def files_of(page): return Path(page).stem + '_files' # a page's pictures


def relinked(
    text:str, # Markdown
    source:Path, # The file it is from
    page:str, # Its page
)->str: # The same with links between pages; what has no page is plain text
    "Make the links of a notebook those of its page; its own pictures stay."
    files = files_of(page)
    def move(m):
        target, _, anchor = m[2].partition('#')
        if re.match(r'[a-z]+:', m[2]) or not target or target.startswith(files): return m[1] + m[2] + m[3]
        found = page_path((source.parent/target).resolve())
        if found is None: return m[1] + 'index.html' + m[3]
        if found.startswith('records/'): keep_record(source.parent/target)
        here = posixpath.relpath(found, posixpath.dirname(page) or '.')
        anchor = re.sub(r'[^\w-]', '', anchor.lower())
        return m[1] + here + (f'#{anchor}' if anchor else '') + m[3]
    return LINK.sub(move, text)


def keep_record(path):
    "Copy a record or its picture, once."
    to = docs/'records'/path.name
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.exists(): shutil.copy(path.resolve(), to)


def only_imports(
    source:str, # A cell
)->bool:
    "Return whether a cell does nothing but import."
    try: body = ast.parse(source).body
    except SyntaxError: return False # a line for the shell
    return all(isinstance(o, (ast.Import, ast.ImportFrom)) or ast.unparse(o).startswith('torch.manual_seed') for o in body)


def readable(
    nb, # A notebook
): # The same without set-up and directives
    "Keep what is to be read: collapsed cells show their outputs only."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = with_mathml(cell.source)
        else:
            cell.source = re.sub(r'^#\| *\w.*\n?', '', cell.source, flags=re.M)
            if cell.metadata.get('jupyter') or only_imports(cell.source): cell.source = ''
            if not cell.source.strip() and not cell.outputs: continue
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python'}
    return nb


def write_notebook(
    path:Path, # A notebook
)->str: # Its page
    "Write a notebook's page, and its pictures beside it."
    page = page_path(path)
    to = docs/page
    to.parent.mkdir(parents=True, exist_ok=True)
    text, resources = MarkdownExporter().from_notebook_node(readable(nbformat.read(path, 4)), dict(output_files_dir=files_of(page)))
    text = text.replace('```python\n\n```', '').replace('```python\n```', '')
    to.write_text(relinked(text, path, page), encoding='utf-8')
    for name, content in resources['outputs'].items():
        picture = to.parent/name
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(content)
    return page


def title_of(
    path:Path, # A notebook
)->tuple: # Its title, and its line
    "Read what a notebook is called."
    first = next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    title, *rest = [line for line in first.split('\n') if line.strip()]
    line = next((o[2:] for o in rest if o.startswith('> ')), '')
    return title.removeprefix('# '), line


def marks()->dict: # Notebook, from the top level -> e.g. '✓✓○'
    "A mark for each claim of a notebook."
    from egrpo.paper.claims import MARKS, claims_table
    table = claims_table()
    return table.word.map(MARKS).groupby(table.notebook).sum().to_dict()


def reading_order(path): return path.stem != 'start_here', path.stem


def write_folder(
    folder:str, # Of notebooks, from nbs/
    verdicts:dict, # From `marks`
)->list: # Its part of the navigation: the page of the folder, then its notebooks
    "Write the pages of a folder, and one that lists them."
    listed = [folder + '/index.md']
    lines = [f'# {folder.split("/")[-1]}', '']
    for path in sorted((root/'nbs'/folder).glob('*.ipynb'), key=reading_order):
        page = write_notebook(path)
        title, line = title_of(path)
        signs = verdicts.get(path.relative_to(root).as_posix(), '')
        name = f'{title} {signs}'.strip()
        listed.append({name: page})
        lines.append(f'- [{name}]({posixpath.basename(page)}) {line}')
    text = with_mathml('\n'.join(lines))
    (docs/folder/'index.md').write_text(text, encoding='utf-8')
    return listed


def modules()->list: # Names, such as core.plan
    "Every module of the library."
    found = sorted((root/'egrpo').rglob('*.py'))
    names = ['.'.join(p.relative_to(root/'egrpo').with_suffix('').parts) for p in found]
    return [name for name in names if not name.startswith('_') and not name.endswith('__init__')]


def notebook_of(
    module:str, # Such as core.plan
)->str: # From the top level
    "The notebook that writes a module."
    path = root/'egrpo'/(module.replace('.', '/') + '.py')
    found = re.search(r'File to edit: (?:\.\./)*(\S+\.ipynb)', path.read_text(encoding='utf-8'))
    return found[1]


def described(
    thing, # A function, class or method
    level:int=1, # Of its heading
)->str: # Markdown
    "Signature with a line per parameter, and the docstring."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc
    text = show_doc(thing, renderer=BasicMarkdownRenderer)._repr_markdown_()
    kept = [line for line in text.split('\n') if not re.match(r'---$|\[source\]|##+ ', line)]
    return '#' * level + f' {thing.__name__}\n\n' + '\n'.join(kept).strip() + '\n'


def own_methods(
    thing, # A function or class
)->list: # Public methods that are documented here
    "List what a class adds."
    if not isinstance(thing, type): return []
    found = [o for name, o in vars(thing).items() if not name.startswith('_')]
    return [o for o in found if callable(o) and getattr(o, '__doc__', None) and hasattr(o, '__code__')]


def write_names()->list: # Navigation: a room, then its names
    "Write a page for each public name: signature, parameters, and the notebook that explains it."
    (docs/'api').mkdir(parents=True, exist_ok=True)
    rooms = {}
    for module in modules():
        loaded = importlib.import_module(f'egrpo.{module}')
        room = module.split('.')[0]
        for name in getattr(loaded, '__all__', []):
            thing = getattr(loaded, name)
            if not hasattr(thing, '__name__'): continue # a constant
            notebook = root/notebook_of(module)
            link = posixpath.relpath(page_path(notebook), 'api')
            place = f'`from egrpo.{module} import {name}` · explained in [{room}/{notebook.stem}]({link})'
            text = described(thing).replace('\n', f'\n\n{place}\n', 1)
            methods = [described(method, 2) for method in own_methods(thing)]
            (docs/f'api/{name}.md').write_text('\n'.join([text, *methods]), encoding='utf-8')
            rooms.setdefault(f'egrpo.{room}', []).append({name: f'api/{name}.md'})
    lines = ['# API', '', 'Every public name, by room.', '']
    for room, names in rooms.items():
        links = ', '.join(f'[{name}]({Path(page).name})' for own in names for name, page in own.items())
        lines.append(f'- **{room}**: {links}')
    (docs/'api/index.md').write_text('\n'.join(lines), encoding='utf-8')
    return ['api/index.md', *[{room: names} for room, names in rooms.items()]]


def build(): # Writes _site/html
    "Write all pages, and let mkdocs make the site."
    shutil.rmtree(site, ignore_errors=True)
    docs.mkdir(parents=True)
    sys.path.insert(0, str(root))
    verdicts = marks()
    nav = [{'Start': [{'egrpo': write_notebook(root/'nbs/index.ipynb')}]}]
    for name in ('PAPERS.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        text = (root/name).read_text(encoding='utf-8')
        (docs/name.lower()).write_text(relinked(text, root/name, name.lower()), encoding='utf-8')
    nav[0]['Start'] += [{'Claims': 'papers.md'}, {'Contributing': 'contributing.md'}, {'Changes': 'changelog.md'}]
    for tab, folders in TABS.items():
        parts = [write_folder(folder, verdicts) for folder in folders]
        nav.append({tab: parts[0] if len(parts) == 1 else [{f'egrpo.{name}': part} for name, part in zip(folders, parts)]})
    write_index_of_figures()
    nav.append({'API': write_names()})
    (docs/'egrpo.css').write_text(CSS, encoding='utf-8')
    (site/'mkdocs.yml').write_text(yaml.safe_dump(CONFIG | dict(nav=nav), allow_unicode=True, sort_keys=False), encoding='utf-8')
    command = [Path(sys.executable).parent/'mkdocs', 'build', '--quiet', '--strict', '--config-file', site/'mkdocs.yml']
    return subprocess.call(command, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})


def write_index_of_figures():
    "A page for the folder of all figures."
    text = '# Figures and tables\n\n- [E-GRPO](egrpo/index.md)\n- [AEGPO](aegpo/index.md)\n- [Beyond the papers](ours/index.md)\n'
    (docs/'figures/index.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    code = build()
    if code: sys.exit('make docs: mkdocs found the faults above')
    print(f'the site: {site/"html/index.html"}')
