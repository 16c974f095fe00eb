import os,sys,time,statistics
def run(argv,env):
    t=time.perf_counter_ns()
    p=os.posix_spawn(argv[0],argv,env,file_actions=[(os.POSIX_SPAWN_OPEN,1,'/dev/null',os.O_WRONLY,0)])
    os.waitpid(p,0)
    return time.perf_counter_ns()-t
subs=[]
for a in sys.argv[2:]:
    parts=a.split(); env={}
    while '=' in parts[0]:
        k,v=parts.pop(0).split('=',1); env[k]=v
    subs.append((a,parts,env,[]))
for i in range(int(sys.argv[1])):
    for s in subs:
        os.system if 0 else None
        s[3].append(run(s[1],s[2]))
base=statistics.median(subs[0][3])
for s in subs:
    m=statistics.median(s[3]); print(f"{m/base:5.2f} {m/1000:7.0f}us  min {min(s[3])/1000:.0f}us {s[0][:110]}")
