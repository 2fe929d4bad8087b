"""Experiments: the same training in several variants over seeds, told in curves, tables and one page.

`experiments` names them, `trial` runs one variant with one seed, `results` keeps and sums up, `drawing` and `telling`
show, `running` leads.
"""
