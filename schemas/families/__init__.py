"""Keys that only some families have: parts of [model], of sources and of prompts, joined into those sections.

A family says which parts it uses (`FamilySpec.parts`); a key of a part that it does not use is refused, by naming whose
it is.
"""
