"""Reads instruction data, divides it over clients and makes round batches.

Import the modules, not names from here: `from fedjax_safety.data import
sources`. In the order in which a run uses them: `sources`, `partition`,
`poison`, `templates`, `cohort`, `batching`; `overlap` audits prompt sets.
Everything is Python and NumPy; nothing here touches a device.
"""
