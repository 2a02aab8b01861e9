"Build the package from settings.ini, the one place where its name, version and requirements stand."
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

status = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable', '6': 'Mature', '7': 'Inactive'}
pythons = [f'3.{minor}' for minor in range(10, 14) if minor >= int(cfg['min_python'].split('.')[1])]
readme = root/'README.md'

def listed(key): return shlex.split(cfg.get(key, ''))

class WithNotebooks(build_py):
    "The package with its notebooks, their records and pages they link to inside: `egrpo notebooks` copies them."
    def run(self):
        super().run()
        if self.editable_mode: return # a checkout has them beside it
        inside = Path(self.build_lib)/cfg['lib_path']/'notebooks'
        skipped = shutil.ignore_patterns('.*', '*.run', '*.lock')
        for name in ('nbs', 'figures'):
            shutil.copytree(root/name, inside/name, ignore=skipped, dirs_exist_ok=True)
        for name in ('PAPERS.md', 'CONTRIBUTING.md'): shutil.copy(root/name, inside/name)

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {status[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: {v}' for v in pythons),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['egrpo', 'egrpo.*']),
    package_data={'egrpo': ['assets/**/*', 'recipes/*.yaml']},
    include_package_data=False,
    install_requires=listed('requirements'),
    extras_require={name: listed(f'{name}_requirements') for name in ('dev', 'int8', 'hpsv2', 'ocr')},
    entry_points={'console_scripts': listed('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    cmdclass={'build_py': WithNotebooks},
    zip_safe=False,
)
