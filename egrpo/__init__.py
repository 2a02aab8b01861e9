"GRPO for text-to-image flow models, guided by entropy."
import logging

__version__ = "0.1.0"

# diffusers asks transformers for image processors that nothing here uses; without torchvision that is two warnings at every start
logging.getLogger('transformers.utils.import_utils').addFilter(lambda record: 'requires torchvision' not in record.getMessage())
