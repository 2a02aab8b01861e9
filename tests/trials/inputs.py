"""Words, prompt files and settings of runs as no user should give them, some hundreds of each, in this process.

Each ends with exit code 0, or 2 and one line that is not long; none shows a traceback, none hangs."""
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from row import Row

from egrpo.base.inputs import PATHS
from egrpo.cli.commands import COMMANDS, main
from egrpo.cli.entry import make_parser
from egrpo.train.trainer import TrainConfig

SECONDS = 30 # that one case may take
LONGEST = 2200 # characters of an error, with the command's name


class Hangs(BaseException):
    "A case took too long."


@contextmanager
def limit(seconds):
    "Inside: an exception after some seconds."
    def late(*_): raise Hangs
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def call(
    words:list, # After `egrpo`
)->tuple: # Exit code, stderr
    "Run a command here; an exception that a user would see as a traceback is raised."
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8') for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), limit(SECONDS):
        try: code = main(words)
        except SystemExit as e: code = e.code
    err.flush()
    return code, err.buffer.getvalue().decode('utf-8')


def fault(
    words:list, # After `egrpo`
    names:tuple=(), # One of these must be in an error
    codes:tuple=(0, 2), # Exit codes that are fine
)->str: # Empty where all is well
    "Fault of a case."
    try: code, err = call(words)
    except Hangs: return 'hangs'
    except BaseException as e: return f'traceback: {type(e).__name__}: {traceback.format_exc().splitlines()[-3].strip()}'
    line = err.strip().split('\r')[-1].splitlines()[-1:]
    if code not in codes: return f'exit code {code}'
    if code == 0: return ''
    if len(err.strip().splitlines()) != 1: return f'{len(err.splitlines())} lines'
    if not line[0].startswith('egrpo'): return 'no error line'
    if len(line[0]) > LONGEST or not line[0].isprintable(): return 'long, or not printable'
    return '' if not names or any(n in line[0] for n in names) else f'names none of {names}: {line[0][:120]}'


def row(
    kind:str, # Of the faults
    cases, # Yields (label, words, names, codes)
)->Row: # Counted
    "Try some cases."
    tried, found = 0, []
    for label, *case in cases:
        tried += 1
        wrong = fault(*case)
        if wrong: found.append(f'{label}: {wrong}')
    for line in found: print('   ', line[:400].encode('ascii', 'backslashreplace').decode(), file=sys.stderr)
    hangs = sum('hangs' in o for o in found)
    return Row(kind, tried, len(found), f"tracebacks {sum('traceback' in o for o in found)}, hangs {hangs}")


WORDS = ['99999999999999999999', '-99999999999999999999', '9' * 5000, '1e38', '1e400', 'inf', '-inf', 'nan', '-1', '0', '1.5', '', ' ',
         'none', 'yes', '\0', 'a\0b', '\udcff', '\ud800', '\x1b[31m', 'a\nb', 'a' * 5000, 'b' * 10**6, '[' * 5000, 'loop', 'loop/in',
         '/dev/zero', '/dev/full', '/proc/self/mem', '/dev/null/in', 'fifo', 'folder', 'file', '~nobody/in', '~', 'a:b', 'a:b:c',
         'file.py:f', 'server(', 'server(http://)', 'clip(', '((((', '1*1', '+', '::', '--', '-', 'é', 'プロンプト']


def option_cases():
    "Every option of the commands that compute nothing, with every word."
    for command, fixed in (('train', ['--dry-run']), ('plan', [])):
        for action in options(command):
            flag = action.option_strings[-1]
            if action.nargs == 0 or flag in ('--help', '--probe'): continue
            related = dict(eval_rewards='reward', base='method', noise_level='tau').get(action.dest, 'seconds')
            names = flag.lstrip('-'), action.dest, related
            for word in WORDS:
                yield f'{command} {flag} {word[:30]!r}', [command, *fixed, f'{flag}={word}'], names


def options(command):
    "The options of a command."
    commands = next(a for a in make_parser()._actions if a.dest == 'command')
    return [a for a in commands.choices[command]._actions if a.option_strings]


# what every option of a number must refuse, of a text, and of a path
NUMBERS = ['99999999999999999999', '9' * 5000, '1e38', 'inf', 'nan', '-', '--', '']
TEXTS = ['\0', 'a\0b', '\udcff', '\ud800']
PLACES = [*TEXTS, 'a' * 5000, 'loop', 'loop/in']


def heavy_cases():
    "Options of the commands that compute, with words that each of them must refuse before it begins."
    for command in ('demo', 'evaluate', 'sample', 'tune', 'reproduce', 'rewards', 'serve'):
        for action in options(command):
            flag = action.option_strings[-1]
            if action.nargs == 0 or flag == '--help': continue
            words = NUMBERS if action.metavar in ('N', 'X') else PLACES if action.dest in PATHS else TEXTS
            for word in words:
                yield f'{command} {flag} {word[:30]!r}', [command, f'{flag}={word}'], (flag, action.dest), (2,)


CONTENTS = [b'', b'\n', b' \n\n', b'\0', b'a\0b\n', b'a\xff\n', b'\xff\xfea\0', b'\xfe\xff\0a',
            b'\xef\xbb\xbf', b'\xef\xbb\xbfa fox\n', b'"', b'[', b'[]', b'{}', b'null', b'NaN', b'1e999',
            b'[' * 100_000, b'{"a":' * 100_000, b'["a", null]', b'[["a"]]', b'{"prompt": 3}',
            b'{"prompt": ""}', b'"\\ud800"', b'["\\u0000"]', b'9' * 5000, b'prompt\n', b'prompt\na,b\n',
            b'prompt,prompt\n,\n', b'prompt;a\nb;c\n', b'prompt\ta\nb\tc\n', b'a,b\nc,d\n',
            b'more,prompt\na,b\n', b'prompt\n"a', b'\x1b[31m\n', b'\r', b'a\r\rb', 'é\u2028b\x85c'.encode(),
            b'a' * 10**6, b'a\n' * 10**5, b'PK\x03\x04', b'\x1f\x8b\x08', b'PAR1', b'- a fox\n',
            b',' * 10**5, b'prompt' + b',' * 10**5, b'prompt\n' + b'a' * 200_000]
ENDINGS = ['', '.txt', '.json', '.jsonl', '.csv', '.tsv', '.JSON', '.yaml', '.parquet', '.xlsx', '.gz', '.']


def prompt_cases(folder):
    "Every content under every ending, and places that are no files."
    for i, content in enumerate(CONTENTS):
        for ending in ENDINGS:
            path = folder/f'p{i}{ending}'
            path.write_bytes(content)
            words = ['train', '--dry-run', '--eval-rewards', 'verifier', '--prompts', str(path)]
            yield f'{ending} {content[:30]!r}', words, ('prompt',)
            path.unlink()


def setting_cases(folder):
    "Settings of a run that goes on: each with values of every kind, and files that hold none."
    values = [None, True, 3, -1, 2.5, 1e38, 10**20, float('nan'), float('inf')]
    values += ['a', '', '\0', '\ud800', 'a' * 10**5, [], [1, 2], {}, [[[]]]]
    run = folder/'run'
    run.mkdir()
    (run/'metrics.jsonl').write_text('{"iteration": 0}\n')
    words = ['train', '--resume', '--dry-run', '--out', str(run)]
    for name in [*TrainConfig().flat(), 'unknown', '', '\0', 'a' * 10**5]:
        for value in values:
            (run/'config.json').write_text(json.dumps({name: value}), encoding='utf-8')
            yield f'{name[:30]!r}: {value!r:.30}', words
    for content in CONTENTS:
        (run/'config.json').write_bytes(content)
        yield f'config.json {content[:30]!r}', words


def random_cases(n=400):
    "Words of command lines in any order."
    draw = random.Random(0)
    flags = sorted({o for command in COMMANDS for a in options(command) for o in a.option_strings} - {'--probe'})
    harmless = ['plan', 'methods', 'claims', 'rewards', 'train', 'trian', '']
    for i in range(n):
        words = [draw.choice(flags + WORDS) for _ in range(draw.randrange(1, 6))]
        command = draw.choice(harmless)
        words = [command, *words] + ['--dry-run'] * (command == 'train')
        yield f'{i} {words!r:.200}', words


def trials(): # Yields a `Row` for each kind
    "All of them, in a folder of their own."
    here, home = os.getcwd(), os.environ.get('HOME')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        os.environ['HOME'] = name
        (folder/'loop').symlink_to('loop')
        os.mkfifo(folder/'fifo')
        (folder/'folder').mkdir()
        (folder/'file').write_text('')
        (folder/'file.py').write_text('f = 3\n')
        try:
            yield row('options of train and plan', option_cases())
            yield row('options of the other commands', heavy_cases())
            yield row('files of prompts', prompt_cases(folder))
            yield row('settings of a run that goes on', setting_cases(folder))
            yield row('words in any order', random_cases())
        finally:
            os.chdir(here)
            if home: os.environ['HOME'] = home
