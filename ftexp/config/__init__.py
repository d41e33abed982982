"""The config schema and its checks. Imports neither torch, Ray, numpy nor pyarrow."""
