"""Files that run a training elsewhere: on Slurm, on Kubernetes by KubeRay and Kueue, by SkyPilot."""
