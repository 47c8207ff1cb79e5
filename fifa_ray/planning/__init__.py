"""What a run will take, from rates and a cluster's shape: pure functions, no Ray, no files."""
