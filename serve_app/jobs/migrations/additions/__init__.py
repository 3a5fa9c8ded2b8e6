"""Steps that only add what older servers can ignore; the same rules as for `versions` hold.

They are counted in a table of their own. An older server sees no step that it does not know, and goes on
using the database, before an upgrade is complete or after it was taken back.
"""
