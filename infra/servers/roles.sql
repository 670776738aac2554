-- A role and its databases for Prefect and for MLflow; neither may enter what is not its own, nor make roles or databases.
-- Run as the superuser, by psql 15 or later, with PREFECT_DB_PASSWORD and MLFLOW_DB_PASSWORD in its environment; run again, it sets the
-- passwords and changes nothing else. `serve postgres` and the container run it; on a server that you have:
--     psql --host HOST --username postgres --set ON_ERROR_STOP=1 --file infra/servers/roles.sql
\getenv prefect PREFECT_DB_PASSWORD
\getenv mlflow MLFLOW_DB_PASSWORD
SET log_min_error_statement = panic;  -- no password in the log
SET client_min_messages = warning;

SELECT 'CREATE ROLE prefect' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'prefect') \gexec
SELECT 'CREATE ROLE mlflow' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
ALTER ROLE prefect LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'prefect';
ALTER ROLE mlflow LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'mlflow';

SELECT 'CREATE DATABASE prefect OWNER prefect' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'prefect') \gexec
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
-- Users and permissions of MLflow: its alembic does not share a database with that of the runs.
SELECT 'CREATE DATABASE mlflow_auth OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow_auth') \gexec

REVOKE ALL ON DATABASE prefect, mlflow, mlflow_auth, postgres, template1 FROM PUBLIC;
