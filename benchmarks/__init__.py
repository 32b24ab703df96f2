"""Programs that measure Fieldmesh and print a table, or JSON with ``--json``. Never run as tests."""
