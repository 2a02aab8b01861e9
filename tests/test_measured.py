"Figures that tests measure are printed below their results, also where other processes run them."
from pathlib import Path

import pytest

pytest_plugins = ['pytester']
TESTS = """
def test_passes(measured): measured('largest difference of two', rewards=0, weights=3.21e-7)
def test_fails(measured):
    measured('largest difference of three', weights=.5)
    assert False
def test_measures_nothing(): pass
"""


@pytest.mark.parametrize('workers', [0, 1])
def test_figures_are_printed(pytester, workers):
    pytester.makeconftest(Path(__file__).with_name('conftest.py').read_text())
    pytester.makepyfile(TESTS)
    done = pytester.runpytest('-q', *(['-n', str(workers)] if workers else []))
    done.stdout.fnmatch_lines(['*= measured =*', 'largest difference of three: weights 0.5',
                               'largest difference of two: rewards 0, weights 3.2e-07'])
    done.assert_outcomes(passed=2, failed=1)
