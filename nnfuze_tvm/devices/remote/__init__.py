"""Boards at the other end of a tracker: trackers, servers, sessions, emulated boards."""
