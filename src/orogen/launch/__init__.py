"""`orogen launch`: a task on many processes of this host, of SLURM or of Kubernetes."""
