"""fasttrain.benchmarks: throughput suites; ``fasttrain bench SUITE`` runs them. Each is a module with a function ``run``."""
