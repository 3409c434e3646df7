"""The training loop: a student, an objective and seeded data; schedules, masks, resume, one process or many."""
