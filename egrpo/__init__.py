"GRPO for text-to-image flow models, guided by entropy."
import logging
from importlib import import_module

__version__ = "0.1.0"

# diffusers asks transformers for image processors that nothing here uses; without torchvision that is two warnings at every start
logging.getLogger('transformers.utils.import_utils').addFilter(lambda record: 'requires torchvision' not in record.getMessage())

# Public name → its module, imported when the name is first asked for: `import egrpo.core.plan` needs torch alone
_homes = {
    'flow_sigmas': 'core.sigmas', 'step_entropy': 'core.entropy', 'merge_lengths': 'core.entropy',
    'Plan': 'core.plan', 'Branch': 'core.plan', 'SDEStep': 'core.plan', 'describe': 'core.plan', 'plot_plan': 'core.plan',
    'rollout': 'core.rollout', 'load_policy': 'models.policy', 'METHODS': 'methods.registry', 'make_plan': 'methods.registry',
    'get_reward': 'rewards.reward', 'Trainer': 'train.trainer', 'TrainConfig': 'train.trainer',
    'sample_images': 'train.evaluate', 'evaluate': 'train.evaluate',
}
__all__ = sorted(_homes)


def __getattr__(name):
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_homes})
