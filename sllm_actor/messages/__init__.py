"""What actors and processes say to each other: pure data, one module a conversation.

Nothing here knows how messages travel; `node` hands the tables to the runtime's codec.
"""
