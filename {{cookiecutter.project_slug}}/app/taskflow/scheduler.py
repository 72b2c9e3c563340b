from .ticks import next_tick

__all__ = ["next_tick"]
