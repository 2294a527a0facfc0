# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images without labels, which the teacher labels.

Read plan.py first (who labels what), then labels.py (what a label looks like) and store.py (where labels are kept).
"""
