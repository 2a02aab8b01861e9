"""Trials that cost more than a test may: `make trials`, or `python tests/trials NAME…` for some.

A trial is a module beside this one with a function `trials()` that yields `Row`s: a kind of fault, how often it was
tried, how often the promise was broken, and figures. The table is printed as it grows; exit code 1 if one broke."""
import importlib
import sys
import time
from pathlib import Path

here = Path(__file__).parent


def modules()->list: # Names, in alphabetical order
    "The modules that hold trials."
    return sorted(p.stem for p in here.glob('[a-z]*.py') if p.stem != 'row')


def line(
    *cells, # What stands in a row
)->str: # The row
    "A row of the table."
    return '  '.join(str(c).ljust(width) for c, width in zip(cells, (44, 7, 7, 9, 0))).rstrip()


def main(
    names:list, # Modules to run; none = all
)->int: # Exit code
    "Run trials and print one table."
    unknown = [n for n in names if n not in modules()]
    if unknown: sys.exit(f"unknown trial {unknown[0]!r}: choose of {', '.join(modules())}")
    print(line('trial', 'tried', 'broken', 'seconds', 'figures'), flush=True)
    broken = 0
    for name in names or modules():
        began = time.monotonic()
        for row in importlib.import_module(name).trials():
            broken += row.broken
            seconds = f'{time.monotonic() - began:.0f}'
            print(line(row.trial, row.tried, row.broken, seconds, row.figures), flush=True)
            began = time.monotonic()
    return int(broken > 0)


if __name__ == '__main__':
    sys.path.insert(0, str(here.parent.parent)) # egrpo of this checkout
    sys.exit(main(sys.argv[1:]))
