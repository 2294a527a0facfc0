# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images that the teacher labels: those without labels, and those whose labels lack some classes.

Read pool.py first: a training asks it alone. images.py says which images there are, format.py and labels.py what a
label looks like, complete.py what the user has labeled, teacher.py what the teacher predicts, and store.py and lists.py
where it is all kept.
"""
