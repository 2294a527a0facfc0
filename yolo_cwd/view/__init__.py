# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a person looks at while a model trains and afterwards: sentences and pictures."""
