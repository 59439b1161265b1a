"""Is the candidate better, and worse at nothing that matters?"""
