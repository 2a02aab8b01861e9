"Settings for every test: hypothesis draws the same examples each time, and slow machines are not failures."
from hypothesis import settings

settings.register_profile('egrpo', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('egrpo')
