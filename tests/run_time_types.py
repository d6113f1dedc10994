"""The run-time check of annotations: beartype, with PEP 484's rule that an int is good where a float is asked for."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
