"""The schema and every check of it; imports neither torch, Ray, numpy nor pyarrow."""
