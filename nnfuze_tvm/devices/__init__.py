"""Where bundles run: targets, toolchains, trackers and RPC servers."""
