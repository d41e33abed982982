"""Files for training on Slurm, on Kubernetes with KubeRay and Kueue, or with SkyPilot."""
