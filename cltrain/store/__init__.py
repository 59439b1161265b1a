"""Durable state: one SQLite (or Postgres) database; short transactions, full sync."""
