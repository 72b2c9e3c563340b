"""The rules of a turn, as functions without I/O: from what arrived and a snapshot of the store to what changes.

Every rule about tasks, queues and schedules is in this folder, and none is in a store.
"""
