"""Tables, pictures and pages from run folders: ``rsotrain-report``. Start at ``writing.py``.

It reads files alone: of the other rooms it imports the names of these files and the ways to show numbers.
"""
