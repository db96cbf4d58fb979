package manifest
import ("testing";"math/rand";"time";"runtime")
func TestHang(t *testing.T){
 seeds:=[]string{good,"kind: &a [*a]\n","a: !!binary |\n  x\n? - b\n: {c: d}\n"}
 alpha:=" \n\t:-[]{}?|>&*!%@'\"#abc1\r,~\x00"
 for n:=0;n<200000;n++{
  b:=[]byte(seeds[rand.Intn(3)])
  if len(b)>300 && rand.Intn(2)==0 {o:=rand.Intn(len(b)-100); b=b[o:o+100]}
  for k:=0;k<1+rand.Intn(4);k++{ i:=rand.Intn(len(b)); switch rand.Intn(3){case 0:b[i]=alpha[rand.Intn(len(alpha))];case 1:b=append(b[:i],b[i+1:]...);case 2:b=append(b[:i],append([]byte{alpha[rand.Intn(len(alpha))]},b[i:]...)...)}; if len(b)==0{break}}
  done:=make(chan struct{})
  go func(){records("f",string(b));close(done)}()
  select{case <-done: case <-time.After(time.Second):
    buf:=make([]byte,8000); nn:=runtime.Stack(buf,true); t.Fatalf("%q\n%s",b,buf[:nn])}
 }
}
