"""The benchmark: hubs on each store against an empty aiohttp handler in one run. Its method: docs/benchmarks.md."""
